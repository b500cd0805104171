"""The boundary loss: exact properties of the hinge, its margins, its weights and its certificate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorainit.boundaries.loss import (
    Target,
    agreement,
    boundary_loss,
    certificate,
    dequantized,
    layer_weights,
    quantized,
    site_loss,
    squared_error,
    target,
)
from matrices import normal

seeds = st.integers(0, 1000)
margins = st.sampled_from([0.0, 0.25, 0.5, 2.0])


def pair(seed: int, rows: int = 3, width: int = 7) -> tuple[Tensor, Tensor]:
    return normal(rows, width, seed=seed), normal(rows, width, seed=seed + 10_000)


def plain(z: Tensor, teacher: Tensor, margin: float) -> Tensor:
    sign = torch.where(teacher > 0, 1.0, -1.0).to(z)
    return (margin - sign * z).clamp(min=0).square().mean()


@given(seeds, margins)
def test_value_and_gradient_are_those_of_the_formula(seed, margin) -> None:
    z, teacher = pair(seed)
    z.requires_grad_()
    loss = site_loss(z, target(teacher, margin))
    assert loss.detach() == pytest.approx(float(plain(z.detach(), teacher, margin)), rel=1e-14, abs=1e-300)
    loss.backward()
    sign = torch.where(teacher > 0, 1.0, -1.0).to(z)
    expected = -2 * sign * (margin - sign * z.detach()).clamp(min=0) / z.numel()
    torch.testing.assert_close(z.grad, expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda x: site_loss(x, target(teacher, margin)), z)


def test_the_hinge_is_flat_at_the_margin_and_zero_is_inactive() -> None:
    z = torch.tensor([[0.5, -0.5, 0.0, 0.2]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, -1.0, 0.0, -0.0]], dtype=torch.float64)
    site_loss(z, target(teacher, 0.5)).backward()
    assert z.grad is not None
    assert z.grad[0, :2].tolist() == [0, 0]
    assert (z.grad[0, 2:] > 0).all()  # a teacher at 0 pulls down
    assert agreement(torch.zeros(1, 4), teacher) == 0.75


@given(seeds)
def test_it_grows_with_the_margin_and_is_convex_in_z(seed) -> None:
    (z, teacher), (other, _) = pair(seed), pair(seed + 1)
    losses = [float(site_loss(z, target(teacher, m))) for m in (0.0, 0.3, 0.7, 1.5)]
    assert losses == sorted(losses)
    middle = float(site_loss((z + other) / 2, target(teacher, 0.5)))
    assert middle <= (float(site_loss(z, target(teacher, 0.5))) + float(site_loss(other, target(teacher, 0.5)))) / 2


@given(seeds, st.sampled_from([0.25, 0.5, 2.0]))
def test_the_loss_certifies_the_agreement(seed, margin) -> None:
    z, teacher = pair(seed)
    loss = float(site_loss(z, target(teacher, margin)))
    assert 1 - agreement(z, teacher) <= certificate(loss, margin) + 1e-15
    assert certificate(loss, 0.0) == 1


@given(seeds, margins)
def test_a_student_equal_to_its_teacher_costs_only_the_margin_and_nothing_when_that_is_clipped(seed, margin) -> None:
    z, _ = pair(seed)
    weights = layer_weights(2)
    loss = float(boundary_loss([z, z], [z, z], margin, weights))
    assert loss == pytest.approx(sum(weights) / 2 * float((margin - z.abs()).clamp(min=0).square().mean()), rel=1e-12)
    assert loss <= margin**2 * sum(weights) / 2 + 1e-15
    assert float(boundary_loss([z], [z], margin, [1.0], kind="clipped")) == 0
    kept = Target(z > 0, dequantized(quantized(z, margin), margin, z.dtype))
    assert float(site_loss(z, kept)) == 0


@given(seeds)
def test_distances_in_bytes_are_short_of_the_true_ones_by_less_than_a_step(seed) -> None:
    z, _ = pair(seed)
    gap = z.abs().clamp(max=0.5) - dequantized(quantized(z, 0.5), 0.5, z.dtype)
    assert float(gap.min()) >= 0
    assert float(gap.max()) <= 0.5 / 255 * (1 + 1e-9)


def test_one_site_scaled_scales_its_loss_by_the_square() -> None:
    z, teacher = pair(0)
    loss = float(boundary_loss([z], [teacher], 0.5, [1.0]))
    assert float(boundary_loss([3 * z], [3 * teacher], 1.5, [1.0])) == pytest.approx(9 * loss, rel=1e-14)
    relative = [float(boundary_loss([c * z], [c * teacher], 0.5, [1.0], kind="relative")) for c in (1.0, 3.0)]
    assert relative[1] == pytest.approx(9 * relative[0], rel=1e-13)
    assert agreement(3 * z, 3 * teacher) == agreement(z, teacher)


def test_padding_never_counts_whatever_stands_there() -> None:
    z, teacher = normal(6, 4, seed=0).reshape(2, 3, 4), normal(6, 4, seed=1).reshape(2, 3, 4)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    dirty = z.clone()
    dirty[~keep] = float("nan")
    dirty.requires_grad_()
    loss = boundary_loss([dirty], [teacher], 0.5, [1.0], keep=[keep])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(plain(z[keep], teacher[keep], 0.5)), rel=1e-14)
    assert dirty.grad is not None and float(dirty.grad[~keep].abs().max()) == 0
    assert agreement(z, teacher, keep) == agreement(z[keep], teacher[keep])
    assert float(squared_error(z, teacher, keep)) == pytest.approx(float((z - teacher)[keep].square().mean()))


def test_half_precision_is_measured_in_single() -> None:
    z, teacher = (x.bfloat16() for x in pair(0))
    z.requires_grad_()
    loss = site_loss(z, target(teacher, 0.5))
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad is not None and z.grad.dtype == torch.bfloat16
    assert float(loss.detach()) == pytest.approx(float(plain(z.detach().float(), teacher.float(), 0.5)), rel=1e-6)


def test_a_mean_over_a_million_half_precision_entries_keeps_its_gradient() -> None:
    z = torch.zeros(1024, 1024, dtype=torch.float16, requires_grad=True)
    (site_loss(z, target(torch.ones_like(z), 0.5)) * 2**16).backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.full_like(z, -(2**16) / 2**20), rtol=1e-3, atol=0)


def test_weights() -> None:
    assert layer_weights(6) == pytest.approx([j / 36 for j in (1, 4, 9, 16, 25, 36)], rel=1e-15)
    assert layer_weights(4, "uniform") == (1, 1, 1, 1)
    assert layer_weights(4, "linear") == (0.25, 0.5, 0.75, 1)
    assert layer_weights(2, "quartic") == (1 / 16, 1)


def test_numbers_and_shapes_of_sites_are_checked() -> None:
    z, teacher = pair(0)
    with pytest.raises(ValueError, match="0 students"):
        boundary_loss([], [], 0.5, [])
    with pytest.raises(ValueError, match="1 students, 1 teachers, 2 weights"):
        boundary_loss([z], [teacher], 0.5, [1.0, 1.0])
    with pytest.raises(ValueError, match="site 0: student"):
        boundary_loss([z], [teacher[:, :3]], 0.5, [1.0])
