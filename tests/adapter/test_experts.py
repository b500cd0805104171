"""Expert parameters (PEFT's target_parameters): one start an expert, in the offset form, saved as PEFT saves them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import cases
import lorainit
from cases import VOCAB, Experts, Net, mixtral
from lorainit import LoraInitError, UnsupportedLayerError
from lorainit.adapter import experts, offset
from lorainit.methods import kaiming, pissa
from lorainit.methods.method import start_layer
from lorainit.numerics.seeds import layer_generator
from lorainit.numerics.sketches import test_matrix as make_test
from lorainit.statistics.layer import Shared
from routed import batches, oracle

FREE = pytest.mark.parametrize("method", cases.METHODS)


def adapted(dtype=torch.float32, **config):
    return cases.with_experts(mixtral().to(dtype), **config)


def batch():
    with cases.seeded(2):
        return {"input_ids": torch.randint(VOCAB, (3, 6))}


def stacks(model):
    return experts.find_experts(model, "default")[0]


def deltas(model):
    return {stack.name: stack.layer.get_delta_weight("default").detach() for stack in stacks(model)}


def disturb(model):
    with torch.no_grad(), cases.seeded(5):
        for stack in stacks(model):
            for module in (stack.lora_A, stack.lora_B):
                parameter = offset.trained_factor(module)
                parameter.add_(0.1 * torch.randn_like(parameter))


@FREE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_data_free_method_starts_every_expert_and_the_function_stays_as_meant(method, dtype):
    model = adapted(dtype)
    base, before = cases.base_tensors(model), cases.logits(model, batch())
    report = cases.start(model, method)
    cases.assert_same_tensors(cases.base_tensors(model), base)
    rows = [row for row in report.layers if row.kind == "experts"]
    assert sorted(row.shape for row in rows) == [(16, 24)] * 2 + [(48, 16)] * 2
    after = cases.logits(model, batch())
    product = lorainit.get_method(method).product
    if method == "orthogonal":
        # its BA is rounding, which can turn over a router's choice in half precision
        assert dtype != torch.float32 or cases.relative_difference(after, before) < 1e-5
    elif product == "step":
        assert not torch.equal(after, before)
    else:
        assert torch.equal(after, before)
    with model.disable_adapter():
        assert torch.equal(cases.logits(model, batch()), before)


def test_each_expert_gets_the_start_of_its_own_weight():
    model = adapted(torch.float64)
    cases.start(model, lorainit.PiSSA(exact=True))
    for stack in stacks(model):
        parameter = stack.layer.get_param()
        assert len(stack.members) == 3
        for i, expert in enumerate(stack.members):
            assert expert.name == f"{stack.name.replace('.base_layer', '')}.{stack.layer.parameter_name}[{i}]"
            assert torch.equal(expert.weight(), parameter[i])
            A, B = pissa.factors(parameter[i], 2, 2.0, exact=True)
            found = expert.factors()
            torch.testing.assert_close(found[1] @ found[0], (B @ A).detach(), rtol=1e-9, atol=1e-12)
    report = cases.start(adapted(torch.float64), lorainit.PiSSA(exact=True))
    row = next(row for row in report.layers if row.kind == "experts")
    values = [torch.linalg.svdvals(e.weight()) for s in stacks(model) if s.name == row.name for e in s.members]
    share = sum(float(v[:2].square().sum()) for v in values) / sum(float(v.square().sum()) for v in values)
    assert row.relative_size == pytest.approx(share**0.5, rel=1e-6)


def test_weights_that_are_stored_in_by_out_are_turned():
    with cases.seeded():
        net = Net(odd=Experts())
    net.odd.is_transposed = True
    model = get_peft_model(net, LoraConfig(r=2, target_modules=[], target_parameters=["odd.up"]))
    (stack,) = stacks(model)
    assert (stack.out_features, stack.in_features) == (6, 8)
    assert torch.equal(stack.members[1].stored_weight(), net.get_parameter("odd.base_layer.up")[1].mT)
    cases.start(model, "olora")
    A, B = stack.members[2].factors()
    expected = B @ torch.linalg.pinv(B) @ stack.members[2].weight()
    torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-4)


def test_a_single_matrix_is_one_expert():
    with cases.seeded():
        net = Net(flat=torch.nn.Flatten(), line=torch.nn.Linear(192, 5))
    expected = cases.logits(net, cases.CONV.batch())
    model = get_peft_model(net, LoraConfig(r=2, target_modules=[], target_parameters=["line.weight"]))
    report = cases.start(model, lorainit.PiSSA(exact=True))
    assert [(row.kind, row.shape, row.base) for row in report.layers] == [("experts", (5, 192), "offset")]
    assert torch.equal(cases.logits(model, cases.CONV.batch()), expected)


def test_the_update_is_that_of_the_trained_factors_minus_the_start(tmp_path):
    model = adapted()
    cases.start(model, "pissa")
    first = [[tuple(f.clone() for f in e.factors()) for e in s.members] for s in stacks(model)]
    disturb(model)
    for stack, starts in zip(stacks(model), first, strict=True):
        delta = stack.layer.get_delta_weight("default")
        for i, ((A0, B0), expert) in enumerate(zip(starts, stack.members, strict=True)):
            A, B = expert.factors()
            torch.testing.assert_close(delta[i], 2.0 * (B @ A - B0 @ A0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved_by", ["lorainit", "peft", "export"])
@pytest.mark.parametrize("method", ["pissa", "kaiming"])
def test_what_is_saved_is_a_plain_adapter(method, saved_by, tmp_path):
    model = adapted()
    cases.start(model, method)
    disturb(model)
    expected = cases.logits(model, batch())
    if saved_by == "lorainit":
        lorainit.save_pretrained(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    folder = tmp_path
    if saved_by == "export":
        folder = tmp_path / "plain"
        lorainit.export(tmp_path, folder)
    fresh = PeftModel.from_pretrained(mixtral(), folder).eval()
    assert not any(offset.is_attached(m) for m in fresh.modules())
    for name, delta in deltas(fresh).items():
        torch.testing.assert_close(delta, deltas(model)[name], rtol=1e-4, atol=1e-5)
    assert cases.relative_difference(cases.logits(fresh, batch()), expected) < 1e-4


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    model = adapted()
    cases.start(model, "pissa")
    disturb(model)
    model.save_pretrained(tmp_path)
    fresh = adapted()
    lorainit.load(fresh, tmp_path)
    again = adapted()
    cases.start(again, "pissa")
    again.load_adapter(tmp_path, "default")
    for other in (fresh, again):
        for one, two in zip(stacks(model), stacks(other), strict=True):
            for a, b in ((one.lora_A, two.lora_A), (one.lora_B, two.lora_B)):
                assert torch.equal(offset.trained_factor(a), offset.trained_factor(b))
                assert torch.equal(a.offset, b.offset)


def test_merging_gives_the_same_function():
    model = adapted()
    cases.start(model, "pissa")
    disturb(model)
    expected = cases.logits(model, batch())
    assert cases.relative_difference(cases.logits(lorainit.merge(model), batch()), expected) < 1e-4


def test_training_moves_the_experts_and_not_the_base():
    model = adapted()
    cases.start(model, "pissa")
    base, before = cases.base_tensors(model), cases.logits(model, batch())
    copied = copy.deepcopy(model)
    cases.train(model, [batch() | {"labels": batch()["input_ids"]}])
    cases.assert_same_tensors(cases.base_tensors(model), base)
    assert not torch.equal(cases.logits(model, batch()), before)
    assert torch.equal(cases.logits(copied, batch()), before)
    cases.start(model, "pissa", overwrite=True)
    assert torch.equal(cases.logits(model, batch()), before)


@pytest.mark.parametrize(
    "method, options, reason",
    [
        ("abm", {"data": True}, "abm trains whole layers"),
        ("hrp", {"data": True}, "hrp trains whole layers"),
        (lorainit.CNTLoRA(constraint="F2", paired=True), {"data": True}, "cntlora compares pairs of positions"),
        (lorainit.LoRADA(mask="labels"), {"data": True}, "lora-da with mask='labels' asks which positions are scored"),
        ("pissa", {"ranks": "budget"}, "ranks='budget' does not share out"),
        ("pissa", {"match_lr": True}, "match_lr does not go with"),
        ("pissa", {"base": "subtract"}, "base='subtract' does not edit"),
    ],
    ids=["abm", "hrp", "pairs", "labels", "ranks", "match_lr", "subtract"],
)
def test_what_is_not_defined_for_experts_is_refused_by_name_and_nothing_changes(method, options, reason):
    options = dict(options)
    if options.pop("data", False):
        options["data"] = [batch() | {"labels": batch()["input_ids"]}]
    model = adapted()
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(UnsupportedLayerError, match=rf"mlp\.experts.*'.*{re.escape(reason)}"):
        cases.start(model, method, **options)
    snapshot.assert_unchanged(model)


def test_or_they_keep_their_default_and_are_named():
    model = adapted()
    before = cases.logits(model, batch())
    with pytest.warns(UserWarning, match=r"left layer 'model\.layers\.1\.mlp\.experts"):
        report = cases.start(model, "corda", data=[batch()], ranks="budget", on_unsupported="default")
    assert sorted(row.kind for row in report.layers) == ["default"] * 4 + ["linear"] * 2
    assert torch.equal(cases.logits(model, batch()), before)


DATA_DRIVEN = {
    "eva": lorainit.EVA(),
    "eva-sketched": lorainit.EVA(sketch=True, columns=6),
    "corda": lorainit.CorDA(),
    "corda-kpm": lorainit.CorDA(mode="kpm"),
    "lora-ga": lorainit.LoRAGA(),
    "lora-one": lorainit.LoRAOne(),
    "lora-da": lorainit.LoRADA(),
    "lora-da-official": lorainit.LoRADA(mode="official", damping=0.1),
    "lora-da-halves": lorainit.LoRADA(cross_fit=True),
    "cntlora": lorainit.CNTLoRA(),
    "ag-lora": lorainit.AGLoRA(),
    "loram": lorainit.LoRAM(reference=lorainit.LoRAGA()),
}


@functools.cache
def dense(loss):
    return oracle(mixtral().double(), batches(padded=True), loss, torch.float32)


@pytest.mark.parametrize("method", DATA_DRIVEN.values(), ids=DATA_DRIVEN)
def test_each_expert_gets_the_start_of_what_it_sees(method):
    model = adapted(torch.float64, target_modules=[])
    cases.start(model, method, data=batches(padded=True))
    for expert in (expert for stack in stacks(model) for expert in stack.members):
        sums = dataclasses.replace(dense(method.request.loss)[expert.name], shared=Shared())
        if method.request.sketch is not None and "input_sketch" in method.request.streams_of(expert):
            test = make_test("in", expert.in_features, method.request.sketch.columns(expert), 0)
            sums.input_sketch = sums.input_second_moment @ test
            sums.input_energy = sums.input_second_moment.trace()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer tokens than would be good
            expected = start_layer(method, expert, layer_generator(0, expert.name), sums)
        A, B = expert.factors()
        assert cases.relative_difference(A, expected.A) < 1e-3
        if expected.B.any():
            assert cases.relative_difference(B, expected.B) < 1e-3
        else:
            assert not B.any()


@pytest.mark.parametrize("method", [DATA_DRIVEN[name] for name in ("eva", "corda", "lora-ga", "lora-one", "lora-da")])
def test_the_base_and_the_function_stay_as_the_method_means(method):
    model = adapted()
    base, before = cases.base_tensors(model), cases.logits(model, batch())
    report = cases.start(model, method, data=batches())
    cases.assert_same_tensors(cases.base_tensors(model), base)
    assert model.config._experts_implementation == "grouped_mm"
    rows = [row for row in report.layers if row.kind == "experts"]
    assert sorted(row.shape for row in rows) == [(16, 24)] * 2 + [(48, 16)] * 2
    after = cases.logits(model, batch())
    assert torch.equal(after, before) == (method.product != "step")
    with model.disable_adapter():
        assert torch.equal(cases.logits(model, batch()), before)


def few():
    """Two tokens: at most four of six experts see any."""
    return [{"input_ids": torch.tensor([[5, 9]]), "labels": torch.tensor([[5, 9]])}]


@pytest.mark.parametrize("method", ["eva", "corda", "lora-one"])
def test_experts_that_saw_no_token_start_as_plain_lora_does_and_are_named(method, tmp_path):
    base = mixtral(6)
    model = cases.with_experts(base, r=1, target_modules=[])
    before = cases.logits(model, batch())
    report = cases.start(model, method, data=few(), cache=tmp_path)
    again = cases.with_experts(mixtral(6), r=1, target_modules=[])
    assert cases.start(again, method, data=few(), cache=tmp_path).details["statistics"]["collected"] is False
    idle = 0
    for stack, other in zip(stacks(model), stacks(again), strict=True):
        row = next(row for row in report.layers if row.name == stack.name)
        said = [re.match(r"experts? ([\d, ]+): saw (.*): PEFT's default, A random", each) for each in row.warnings]
        assert said[0][2] == "no token of the calibration data"
        named = {int(index) for each in said if each for index in each[1].split(", ")}
        for expert, twin in zip(stack.members, other.members, strict=True):
            A, B = expert.factors()
            assert all(torch.equal(f, g) for f, g in zip((A, B), twin.factors(), strict=True))
            plain = kaiming.factors(*expert.weight().shape, 1, generator=layer_generator(0, expert.name))
            assert torch.equal(A, plain.A) == (expert.index in named)
            assert expert.index not in named or not B.any()
            idle += expert.index in named
    assert idle >= 2 * len(stacks(model))
    if method != "lora-one":
        assert torch.equal(cases.logits(model, batch()), before)


def test_experts_whose_tokens_no_loss_depends_on_are_named():
    model = cases.with_experts(mixtral(), r=1, target_modules=[])
    data = batches()[0]
    data["labels"] = data["labels"].clone()
    data["labels"][:, 2:] = -100  # one scored token a row, which two experts of the last layer have made
    report = cases.start(model, "lora-ga", data=[{name: value[:1] for name, value in data.items()}])
    said = [remark for row in report.layers for remark in row.warnings]
    assert any("saw tokens, but no loss depends on them: PEFT's default" in remark for remark in said)
    data["labels"][:] = -100
    with pytest.raises(LoraInitError, match="no label that counts"):
        cases.start(model, "lora-ga", data=[data])


def test_a_failure_on_the_way_leaves_everything_as_it_was():
    def broken():
        yield from batches()
        raise OSError("the disk is gone")

    model = adapted()
    forwards = [vars(stack.base_layer).get("forward") for stack in stacks(model)]
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(OSError, match="the disk is gone"):
        cases.start(model, "lora-da", data=broken())
    snapshot.assert_unchanged(model)
    assert model.config._experts_implementation == "grouped_mm"
    assert [vars(stack.base_layer).get("forward") for stack in stacks(model)] == forwards


def test_two_sets_of_data_and_sums_in_files_and_groups(tmp_path):
    method = lorainit.CNTLoRA(constraint="F5")
    found = []
    for options in ({}, {"offload": tmp_path}, {"memory_budget": "80KB"}):
        model = adapted()
        cases.start(model, method, data=batches(), proxy_data=batches(seed=9), **options)
        found.append([factor for stack in stacks(model) for factor in stack.factors()])
    for other in found[1:]:
        assert all(torch.equal(f, g) for f, g in zip(found[0], other, strict=True))


def test_a_dead_expert_and_too_high_a_rank_are_named():
    model = adapted()
    with torch.no_grad():
        stacks(model)[0].layer.get_param()[1].zero_()
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(UnsupportedLayerError, match=r"_proj\[1\]'"):
        cases.start(model, "pissa")
    snapshot.assert_unchanged(model)
    with pytest.raises(UnsupportedLayerError, match=r"_proj\[0\]'.*rank 20 exceeds"):
        cases.start(adapted(r=20, target_modules=[]), "olora")


def test_a_stack_of_another_kind_of_number_is_refused():
    with cases.seeded():
        net = Net(odd=Experts())
    net.odd.up = torch.nn.Parameter(net.odd.up.detach().to(torch.float8_e4m3fn), requires_grad=False)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=[], target_parameters=["odd.up"]))
    with pytest.raises(LoraInitError, match=r"'odd': expert parameters of type Parameter, torch.float8_e4m3fn"):
        cases.start(model, "pissa")
