"""What each expert sees, against a dense product of all tokens with all experts in float64, and autograd."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import cases
from cases import Experts, Net, mixtral, with_experts
from lorainit import LoraInitError, UnsupportedLayerError, find_sites
from lorainit.adapter.experts import find_experts
from lorainit.statistics import Request, collect
from lorainit.statistics.batches import count_terms
from routed import STREAMS, batches, oracle

ALL = Request(frozenset(STREAMS), dtype=torch.float64)
FORWARD = Request(frozenset({"input_second_moment", "input_sum"}), dtype=torch.float64)


def sums(model, data, request=ALL, **options):
    return collect(model, find_experts(model, "default")[0], data, request, progress=False, **options)


def near(actual, expected) -> None:
    # Transformers computes its losses in float32, whatever the model's dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 * float(expected.abs().max()) + 1e-14)


@pytest.mark.parametrize(
    "loss, padded, checkpointing",
    [("sum", False, False), ("sum", True, False), ("sum", True, True), ("sequence_mean", False, False)],
)
def test_each_experts_sums_are_those_of_a_dense_product(loss, padded, checkpointing) -> None:
    expected = oracle(mixtral().double(), batches(padded=padded), loss)
    model = with_experts(mixtral().double())
    if checkpointing:
        model.config.use_cache = False
        for layer in model.get_base_model().model.layers:
            layer.forward = lambda *a, _plain=layer.forward, **k: torch.utils.checkpoint.checkpoint(
                _plain, *a, use_reentrant=False, **k
            )
    found = sums(model, batches(2, padded), Request(ALL.streams, loss=loss, dtype=torch.float64))
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name].tokens, found[name].sequences) == (wanted.tokens, wanted.sequences)
        assert found[name].labels == wanted.labels
        for stream in STREAMS:
            near(getattr(found[name], stream), getattr(wanted, stream))


@pytest.mark.parametrize(
    "make, implementation",
    [(mixtral, "eager"), (mixtral, "batched_mm"), (cases.qwen_moe, "grouped_mm"), (cases.gpt_oss, "grouped_mm")],
)
def test_the_weight_gradient_is_autograds_whatever_runs_the_experts(make, implementation) -> None:
    base = make().double()
    base.config._experts_implementation = implementation
    model, data = with_experts(base), batches(padded=False)[0]
    found = sums(model, [data], Request(frozenset({"weight_gradient", "input_sum"}), dtype=torch.float64))
    assert base.config._experts_implementation == implementation
    base.config._experts_implementation = "eager"  # the grouped product takes no float64
    stacks = find_experts(model, "default")[0]
    parameters = [stack.layer.get_param().requires_grad_() for stack in stacks]
    with model.disable_adapter():
        (model(**data).loss * count_terms(model, data)).backward()
    for stack, parameter in zip(stacks, parameters, strict=True):
        assert sum(found[expert.name].tokens for expert in stack.members) == 2 * data["input_ids"].numel()
        for expert, gradient in zip(stack.members, parameter.grad, strict=True):
            transposed = make is cases.gpt_oss
            near(found[expert.name].weight_gradient, gradient.mT if transposed else gradient)


def test_forward_sums_groups_and_micro_batches_are_the_same() -> None:
    model = with_experts(mixtral().double())
    expected = oracle(mixtral().double(), batches(padded=True))
    budget = max(FORWARD.sum_bytes(stack) for stack in find_experts(model, "default")[0])
    for options in ({}, {"micro_batch": 2}, {"memory_budget": budget}):
        found = sums(model, batches(3, padded=True), FORWARD, **options)
        for name, wanted in expected.items():
            near(found[name].input_second_moment, wanted.input_second_moment)
    with pytest.raises(LoraInitError, match=r"mlp\.experts.*' alone needs"):
        sums(model, batches(), FORWARD, memory_budget=budget // 2)


def test_padding_in_front_is_refused_and_everything_is_put_back() -> None:
    model = with_experts(mixtral())
    (data,) = batches(padded=True)
    flipped = {name: value.flip(1) for name, value in data.items()}
    before = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=r"only possible behind the tokens of a row \(attention_mask \[0, 0, 1"):
        sums(model, [flipped])
    before.assert_unchanged(model)
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("what", ["einsum", "bmm", "part", "copy"])
def test_a_stack_that_is_used_in_another_way_is_refused_by_name(what) -> None:
    class Other(Experts):
        def forward(self, x):
            if what == "einsum":
                return torch.einsum("b...i,eio->b...o", x[:, 0], self.up).mean((1, 2))[:, None]
            x = x[:, 0, :, :6]
            if what == "bmm":
                return torch.bmm(x[:3], self.up.mT[:, :6, :6].contiguous()).mean((1, 2))[:, None]
            weight = self.up[1, :6] if what == "part" else self.up[torch.tensor([1])][0, :6]
            return (x @ weight).mean((1, 2))[:, None]

    with cases.seeded():
        net = Net(odd=Other())
    net.odd.is_transposed = True
    model = get_peft_model(net, LoraConfig(r=2, target_modules=[], target_parameters=["odd.up"]))
    before = cases.Snapshot.of(model)
    named = {"einsum": r"torch\.functional\.einsum", "bmm": r".*contiguous", "part": r".*matmul", "copy": r".*getitem"}
    with pytest.raises(UnsupportedLayerError, match=rf"layer 'odd\.up': the model computes {named[what]}"):
        cases.start(model, "eva", data=cases.CONV.batches())
    before.assert_unchanged(model)


def test_stacks_that_share_their_memory_are_refused_by_name() -> None:
    base = mixtral()
    first, second = (layer.mlp.experts for layer in base.model.layers)
    second.down_proj = first.down_proj
    model = with_experts(base)
    with pytest.raises(UnsupportedLayerError, match=r"down_proj\[0\]': another layer has the same weight in memory"):
        sums(model, batches())


def test_a_single_matrix_is_watched_as_a_layer_with_its_padding() -> None:
    base, other = cases.LLAMA.base(torch.float64), cases.LLAMA.base(torch.float64)
    data = [{k: v.clamp(max=cases.VOCAB - 1) for k, v in batch.items()} for batch in batches(padded=True)]
    with cases.seeded(1):
        plain = get_peft_model(other, LoraConfig(r=2, target_modules=["model.layers.0.mlp.down_proj"]))
        options = {"target_modules": [], "target_parameters": ["layers.0.mlp.down_proj.weight"]}
        model = get_peft_model(base, LoraConfig(r=2, **options))
    (wanted,) = collect(plain, find_sites(plain)[0], data, ALL, progress=False).values()
    (found,) = sums(model, data).values()
    assert found.tokens == wanted.tokens
    for stream in STREAMS:
        near(getattr(found, stream), getattr(wanted, stream))
