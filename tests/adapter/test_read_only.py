"""What writes to a factor in the offset form is an error, not lost; what reads it is not disturbed."""

from __future__ import annotations

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import cases
import lorainit
from cases import CONV, LLAMA, Snapshot
from lorainit import LoraInitError
from lorainit.adapter.read_only import ReadOnlyTensor, read_only


def started(case=LLAMA, **config):
    model = case.adapted(**config)
    cases.start(model, "pissa")
    return model


def one_factor(model):
    return next(m for m in model.modules() if lorainit.offset.is_attached(m))


WRITES = {
    "in place": lambda m: m.weight.zero_(),
    "nn.init": lambda m: nn.init.kaiming_uniform_(m.weight),
    "nn.init by name": lambda m: nn.init.zeros_(tensor=m.weight),
    "data": lambda m: m.weight.data.copy_(torch.zeros_like(m.weight)),
    "data set": lambda m: setattr(m.weight, "data", torch.zeros_like(m.weight)),
    "data of another shape": lambda m: setattr(m.weight, "data", torch.zeros(1)),
    "rows": lambda m: m.weight.__setitem__(slice(0, 1), 0),
    "added": lambda m: m.weight.__iadd__(1),
    "frozen": lambda m: m.weight.requires_grad_(False),
    "frozen by its flag": lambda m: setattr(m.weight, "requires_grad", False),
    "output": lambda m: torch.mul(m.trained, 2, out=m.weight),
    "one of several outputs": lambda m: torch.max(torch.ones(2, 3), 0, out=(m.weight, torch.zeros(3).long())),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_is_an_error_and_changes_nothing(write):
    model = started()
    snapshot = Snapshot.of(model)
    with torch.no_grad(), pytest.raises(LoraInitError, match="offset form.*would be lost"):
        write(one_factor(model))
    snapshot.assert_unchanged(model)


def test_resetting_with_peft_is_an_error():
    model = started()
    layer = lorainit.find_sites(model)[0][0].layer
    snapshot = Snapshot.of(model)
    with pytest.raises(LoraInitError, match="offset form"):
        layer.reset_lora_parameters("default", True)
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize("rank", [2, 8, 12], ids=["smaller", "as large", "larger"])
def test_hot_swapping_is_an_error_and_a_saved_adapter_can_be_swapped_in_elsewhere(rank, tmp_path):
    LLAMA.adapted(r=rank, lora_alpha=1.5 * rank).save_pretrained(tmp_path / "other")
    model = started()
    before = cases.logits(model, LLAMA.batch())
    with pytest.raises(LoraInitError, match="offset form"):
        hotswap_adapter(model, tmp_path / "other", "default")
    assert torch.equal(cases.logits(model, LLAMA.batch()), before)
    cases.train(model, LLAMA.batches())
    trained = cases.logits(model, LLAMA.batch())
    lorainit.save_pretrained(model, tmp_path / "ours")
    plain = LLAMA.adapted(r=8, lora_alpha=12)
    hotswap_adapter(plain, tmp_path / "ours", "default")
    assert cases.relative_difference(cases.logits(plain, LLAMA.batch()), trained) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [LLAMA, CONV], ids=lambda case: case.name)
def test_reading_is_as_before_and_gives_plain_tensors(case, dtype):
    model = case.adapted(dtype, autocast=False)
    cases.start(model, "pissa")
    module = one_factor(model)
    weight = module.weight
    assert isinstance(weight, ReadOnlyTensor) and isinstance(weight.data, ReadOnlyTensor)
    assert type(weight + 1) is type(weight.detach()) is type(weight.flatten(1).T) is torch.Tensor
    (weight * 2).sum().backward()
    assert module.trained.grad is not None
    assert type(module.trained) is nn.Parameter and weight.requires_grad
    site = lorainit.find_sites(model)[0][0]
    assert not site.layer.get_delta_weight("default").any()  # PEFT writes back what it has read, in half precision


def test_the_guard_is_for_the_tensor_that_is_written_to_only():
    target, guarded = torch.zeros(3), read_only(torch.ones(3))
    target.copy_(guarded)
    target.add_(guarded)
    assert torch.equal(target, torch.full((3,), 2.0))
    torch.add(guarded, guarded, out=target)
    assert torch.equal(target, torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(guarded, torch.zeros(3).as_subclass(ReadOnlyTensor))
