"""Expert parameters (PEFT's target_parameters): one start an expert, in the offset form, saved as PEFT saves them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import cases
import lorainit
from cases import VOCAB, Experts, Net
from lorainit import LoraInitError, UnsupportedLayerError, experts, offset
from lorainit.methods import pissa

FREE = pytest.mark.parametrize("method", cases.METHODS)


def mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    chosen = {"num_local_experts": 3, "num_experts_per_tok": 2, "initializer_range": 0.3}
    with cases.seeded():
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, **chosen)).eval()


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(dtype=torch.float32, **config):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    with cases.seeded(1):
        return get_peft_model(mixtral().to(dtype), LoraConfig(**(options | config))).eval()


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
    cases.start(model, "pissa")
    assert torch.equal(cases.logits(model, batch()), before)


@pytest.mark.parametrize(
    "method, options, reason",
    [
        ("eva", {"data": True}, "eva needs to know what each expert sees"),
        (lorainit.LoRAM(reference=lorainit.LoRAGA()), {"data": True}, "loram needs to know what each expert sees"),
        ("pissa", {"ranks": "budget"}, "ranks='budget' does not share out"),
        ("pissa", {"match_lr": True}, "match_lr does not go with"),
        ("pissa", {"base": "subtract"}, "base='subtract' does not edit"),
    ],
    ids=["eva", "loram-reference", "ranks", "match_lr", "subtract"],
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
        report = cases.start(
            model, "corda", data=[batch() | {"labels": batch()["input_ids"]}], on_unsupported="default"
        )
    assert sorted(row.kind for row in report.layers) == ["default"] * 4 + ["linear"] * 2
    assert torch.equal(cases.logits(model, batch()), before)


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
