"""The offset form of a pair of factors, without a model: exact at the start, right after it, safe in a state dict."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import lorainit
from cases import DTYPES, each_dtype, seeded
from lorainit.adapter import offset

IN, OUT, RANK = 6, 5, 2


def linear():
    return nn.Linear(IN, RANK, bias=False), nn.Linear(RANK, OUT)


def convolution(dimensions):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return layer(IN, RANK, 3, stride=2, padding=1, bias=False), layer(RANK, OUT, 1)


PAIRS = {
    "linear": (linear, (4, IN)),
    "conv1d": (lambda: convolution(1), (4, IN, 7)),
    "conv2d": (lambda: convolution(2), (4, IN, 7, 5)),
    "conv3d": (lambda: convolution(3), (4, IN, 3, 4, 5)),
}
each_pair = pytest.mark.parametrize("make, shape", PAIRS.values(), ids=PAIRS)


def a_pair(make=linear, dtype=torch.float32):
    """A pair with a start that is far from zero, its bias zero as PEFT makes it."""
    with seeded():
        pair = [module.to(dtype) for module in make()]
        nn.init.zeros_(pair[1].bias)
        return pair


def attached(make=linear, dtype=torch.float32, **options):
    pair = a_pair(make, dtype)
    offset.attach(*pair, **options)
    return pair


def move(pair, size=0.5, seed=1):
    """What an optimizer does: change the trained factors in place."""
    with seeded(seed), torch.no_grad():
        for module in pair:
            factor = offset.trained_factor(module)
            factor.add_(size * torch.randn(factor.shape, dtype=factor.dtype))


def apply(pair, x):
    return pair[1](pair[0](x))


def product(a, b):
    return b.flatten(1).double() @ a.flatten(1).double()


def snapshot(pair):
    return [(type(m), {n: t.clone() for n, t in m.__dict__["_parameters"].items() if t is not None}) for m in pair]


@each_dtype
@each_pair
def test_the_product_is_exactly_zero_at_the_start(make, shape, dtype):
    pair = attached(make, dtype)
    assert torch.count_nonzero(product(*offset.update_factors(*pair))) == 0
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.count_nonzero(apply(pair, x)) == 0


@each_pair
def test_the_update_is_BA_minus_its_start(make, shape):
    plain = a_pair(make, torch.float64)
    expected = -product(*(m.weight for m in plain))
    pair = attached(make, torch.float64)
    move(pair)
    expected += product(*(offset.trained_factor(m) for m in pair))
    torch.testing.assert_close(product(*offset.update_factors(*pair)), expected, rtol=1e-12, atol=1e-12)
    # ... in the forward as well
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = apply(plain, x)
    moved = copy.deepcopy(pair)
    offset.detach(*moved)
    torch.testing.assert_close(apply(pair, x), apply(moved, x) - start, rtol=1e-12, atol=1e-12)


def test_a_small_update_is_not_drowned_in_the_rounding_of_two_large_terms():
    pair = attached(dtype=torch.float32)
    move(pair, size=1e-5)
    trained = product(*(offset.trained_factor(m) for m in pair))
    exact = trained - product(*(m.offset for m in pair))
    x = torch.randn(8, IN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (apply(pair, x).double() - x.double() @ exact.T).norm() / (x.double() @ exact.T).norm()
    # the difference of two float32 products would be off by ε/1e-5, some hundred times as much
    assert error < 4 * torch.finfo(torch.float32).eps


@each_pair
def test_the_gradients_are_those_of_the_plain_pair(make, shape):
    plain, pair = a_pair(make, torch.float64), attached(make, torch.float64)
    move(plain)
    move(pair)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for modules in (plain, pair):
        y = apply(modules, x)
        # linear in y, so that the offset changes the value of the loss but not what flows back
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    for a, b in zip(plain, pair, strict=True):
        torch.testing.assert_close(b.trained.grad, a.weight.grad, rtol=1e-12, atol=1e-12)


@each_pair
def test_attach_and_detach_keep_modules_and_parameters_and_leave_nothing_behind(make, shape):
    pair = a_pair(make)
    before = [(id(m), type(m), id(m.weight), set(vars(m)), set(m._buffers)) for m in pair]
    offset.attach(*pair)
    assert [id(m.trained) for m in pair] == [parameter for *_, parameter, _, _ in before]
    assert all(offset.is_attached(m) and isinstance(m, before[i][1]) for i, m in enumerate(pair))
    move(pair)
    values = [m.trained.clone() for m in pair]
    offset.detach(*pair)
    assert [(id(m), type(m), id(m.weight), set(vars(m)), set(m._buffers)) for m in pair] == before
    assert all(torch.equal(m.weight, value) for m, value in zip(pair, values, strict=True))
    offset.detach(*pair)  # a plain pair is left alone
    assert not any(offset.is_attached(m) for m in pair)


def test_only_the_trained_factor_is_a_parameter():
    for module, plain in zip(attached(), a_pair(), strict=True):
        assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
        assert [name for name, _ in module.named_buffers()] == ["offset"]
        assert not module.offset.requires_grad


def test_a_later_start_of_the_trained_factor_does_not_move_the_frozen_one():
    pair = attached()
    frozen = [m.offset.clone() for m in pair]
    move(pair)
    assert all(torch.equal(m.offset, old) for m, old in zip(pair, frozen, strict=True))


@pytest.mark.parametrize(
    "odd", [nn.Identity(), nn.Embedding(4, 4), nn.Bilinear(2, 2, 2)], ids=lambda m: type(m).__name__
)
def test_other_factors_are_refused(odd):
    assert not offset.can_attach(odd)
    with pytest.raises(lorainit.LoraInitError, match=type(odd).__name__):
        offset.attach(odd, nn.Linear(2, 2))


@each_dtype
@each_pair
def test_the_state_dict_holds_a_plain_pair_of_twice_the_rank_with_the_same_update(make, shape, dtype):
    pair = attached(make, dtype)
    move(pair)
    a, b = (m.state_dict()["weight"] for m in pair)
    assert a.shape[0] == b.shape[1] == 2 * RANK
    assert a.dtype == b.dtype == dtype
    exact = product(*(m.trained for m in pair)) - product(*(m.offset for m in pair))
    torch.testing.assert_close(product(a, b), exact, rtol=1e-12, atol=1e-12)
    assert set(pair[1].state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("assign", [False, True])
@each_dtype
@each_pair
def test_a_state_dict_comes_back_to_the_last_bit(make, shape, dtype, assign):
    pair = attached(make, dtype)
    move(pair)
    again = a_pair(make, dtype)
    move(again, seed=8)  # another start, and away from it
    offset.attach(*again)
    move(again, seed=9)
    for module, saved in zip(again, pair, strict=True):
        state = {k: v.clone() for k, v in saved.state_dict().items()}
        module.load_state_dict(state, assign=assign)
        assert state["weight"].shape == saved.state_dict()["weight"].shape  # the caller's dict is left alone
    for module, saved in zip(again, pair, strict=True):
        assert torch.equal(module.trained, saved.trained)
        assert torch.equal(module.offset, saved.offset)
        assert torch.equal(module.weight, saved.weight)


@pytest.mark.parametrize("strict", [True, False])
@each_pair
def test_a_plain_file_does_not_load_into_the_offset_form_nor_the_reverse(make, shape, strict):
    plain, pair = a_pair(make), attached(make)
    move(pair)
    before = snapshot(plain), snapshot(pair)
    for module, other in zip(pair, plain, strict=True):
        with pytest.raises(RuntimeError, match=r"offset form \(rank 2, saved as rank 4\), but the file holds rank 2"):
            module.load_state_dict({"weight": other.weight}, strict=strict)
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict({"weight": module.state_dict()["weight"]}, strict=strict)
    for old, new in zip(before, (snapshot(plain), snapshot(pair)), strict=True):
        for (old_type, old_tensors), (new_type, new_tensors) in zip(old, new, strict=True):
            assert old_type is new_type
            assert all(torch.equal(old_tensors[k], new_tensors[k]) for k in old_tensors)


def test_with_an_edited_base_the_forward_uses_the_trained_factor_and_the_state_dict_the_update():
    plain, pair = a_pair(), attached(base_edited=True)
    for module, other in zip(pair, plain, strict=True):
        assert torch.equal(module.weight, other.weight)
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply(pair, x), apply(plain, x))
    assert torch.count_nonzero(product(*offset.update_factors(*pair))) == 0
    assert torch.count_nonzero(product(*(m.state_dict()["weight"] for m in pair))) == 0


def test_a_base_that_was_edited_for_another_start_refuses_the_file():
    pair = attached(base_edited=True)
    same = [{k: v.clone() for k, v in m.state_dict().items()} for m in pair]
    for module, state in zip(pair, same, strict=True):
        module.load_state_dict(state)
    with torch.no_grad():
        same[0]["weight"][-1, 0] += 1
        same[1]["weight"][0, -1] += 1
    for module, state in zip(pair, same, strict=True):
        before = module.offset.clone()
        with pytest.raises(RuntimeError, match="the base of this model was edited for another start"):
            module.load_state_dict(state, strict=False)
        assert torch.equal(module.offset, before)


def pickled(pair):
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("base_edited", [False, True])
@each_pair
def test_copies_are_equal_and_independent(make, shape, base_edited, copied):
    pair = attached(make, base_edited=base_edited)
    move(pair)
    other = copied(pair)
    for a, b in zip(pair, other, strict=True):
        assert type(a) is type(b)
        assert (a.stack_axis, a.base_edited) == (b.stack_axis, b.base_edited)
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.state_dict()["weight"], b.state_dict()["weight"])
    values = [m.update_factor().clone() for m in pair]
    move(other, seed=5)
    assert all(torch.equal(m.update_factor(), value) for m, value in zip(pair, values, strict=True))


@pytest.mark.parametrize("dtype", [DTYPES["bf16"], DTYPES["fp64"]], ids=["bf16", "fp64"])
def test_a_cast_takes_the_frozen_factor_along(dtype):
    pair = [module.to(dtype) for module in attached()]
    assert all(m.trained.dtype == m.offset.dtype == m.weight.dtype == dtype for m in pair)
    assert torch.count_nonzero(product(*offset.update_factors(*pair))) == 0


def test_a_new_parameter_may_take_the_trained_factor_s_place():
    pair = attached()
    new = nn.Parameter(torch.ones(RANK, IN))
    pair[0].weight = new
    assert offset.trained_factor(pair[0]) is new
    assert torch.equal(pair[0].weight[:RANK], new)
