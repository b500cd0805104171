"""The local solver: monotone, of low rank, and as good as a low-rank teacher allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
from inputs import inputs
from lorainit import ABMLoRA, LoraInitError
from lorainit.boundaries.local import solve_boundaries
from lorainit.boundaries.loss import agreement, target
from matrices import normal


def problem(seed: int, rank: int = 2, n: int = 12, o: int = 9, tokens: int = 60):
    X = inputs(tokens, n, seed=seed)
    W = normal(o, n, seed=seed + 1)
    change = normal(o, rank, seed=seed + 2) @ normal(rank, n, seed=seed + 3)
    return X, X @ W.mT, X @ (W + change).mT


@given(st.integers(0, 200), st.sampled_from([0.1, 0.5, 2.0]), st.booleans())
def test_the_penalized_loss_never_increases_and_is_what_the_factors_give(seed, margin, zero_start) -> None:
    X, Z0, teacher = problem(seed)
    A = normal(2, 12, seed=seed + 5)
    B = torch.zeros(9, 2, dtype=X.dtype) if zero_start else normal(9, 2, seed=seed + 6)
    wanted = target(teacher, margin)
    found = solve_boundaries(X, Z0, wanted, A, B, ridge=1e-2, iterations=15)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(found.curve, found.curve[1:], strict=False))
    assert found.A.shape == A.shape and found.B.shape == B.shape

    def penalized(A, B):
        z = Z0 + X @ A.mT @ B.mT
        sign = torch.where(teacher > 0, 1.0, -1.0).to(z)
        epsilon = 1e-2 * float((X.mT @ X).diagonal().mean())
        return float((margin - sign * z).clamp(min=0).square().sum() + epsilon * (B @ A).square().sum())

    assert found.curve[0] == pytest.approx(penalized(A, B), rel=1e-8)
    if len(found.curve) > 1:
        assert found.curve[-1] == pytest.approx(penalized(found.A, found.B), rel=1e-8)


def test_it_reaches_the_loss_of_a_teacher_of_its_rank() -> None:
    X, Z0, teacher = problem(0, tokens=400)
    wanted = target(teacher, 0.5)
    own = float((0.5 - teacher.abs()).clamp(min=0).square().sum())
    A, B = normal(2, 12, seed=9), torch.zeros(9, 2, dtype=X.dtype)
    found = solve_boundaries(X, Z0, wanted, A, B, ridge=1e-6, iterations=300)
    assert found.curve[-1] <= own * 1.02
    z = Z0 + X @ found.A.mT @ found.B.mT
    assert agreement(z, teacher) > 0.99


def test_a_clipped_margin_is_met_by_the_teacher_itself() -> None:
    X, Z0, teacher = problem(1)
    wanted = target(teacher, 0.5, "clipped")
    A, B = normal(2, 12, seed=9), torch.zeros(9, 2, dtype=X.dtype)
    found = solve_boundaries(X, Z0, wanted, A, B, ridge=1e-6, iterations=300)
    assert found.curve[-1] < 0.02 * found.curve[0]


def test_inputs_without_signal_are_refused() -> None:
    X, Z0, teacher = problem(2)
    with pytest.raises(ValueError, match="mean of the diagonal"):
        solve_boundaries(0 * X, Z0, target(teacher, 0.5), normal(2, 12, seed=9), normal(9, 2, seed=8))


def adapted(case=cases.LLAMA, **config):
    model = case.adapted(torch.float64, target_modules=["gate_proj", "q_proj"], **config)
    with cases.seeded(5):
        model.add_adapter("teacher", case.lora_config(target_modules=["gate_proj", "q_proj"], r=2))
    model.set_adapter("teacher")
    cases.train(model, case.batches(), 20)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("origin", ["kaiming", "orthogonal", "pissa"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "clipped"])
def test_in_a_model_it_aligns_far_better_than_the_gradient_steps(origin, kind) -> None:
    found = {}
    for solver in ("gradient", "local"):
        method = ABMLoRA(teacher="teacher", origin=origin, solver=solver, margin_kind=kind, layers="all", steps=20)
        report = cases.start(adapted(), method, data=cases.LLAMA.batches() * 2)
        found[solver] = report.details
    local = found["local"]
    for curve in local["layer_curves"].values():
        assert curve == sorted(curve, reverse=True)
        assert curve[-1] < 0.2 * curve[0]
    assert local["after"]["train"]["loss"] < found["gradient"]["after"]["train"]["loss"]
    assert local["after"]["train"]["agreement"] > found["gradient"]["after"]["train"]["agreement"]
    assert set(local["frozen_layers"]) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_what_the_teacher_computes_meanwhile_is_not_taken_for_the_layers_input() -> None:
    curves = []
    for options in ({}, {"report_batches": 0}, {"cache": False}):
        method = ABMLoRA(teacher="teacher", solver="local", layers="all", batch_size=2, **options)
        curves.append(cases.start(adapted(), method, data=cases.LLAMA.batches() * 4).details["layer_curves"])
    assert curves[1] == curves[0]
    assert curves[2] == curves[0]


def test_a_layer_that_has_nothing_to_solve_keeps_its_start() -> None:
    model = cases.LLAMA.adapted(target_modules=["gate_proj"])
    report = cases.start(model, ABMLoRA(solver="local", margin_kind="clipped"), data=cases.LLAMA.batches())
    assert all(row.base == "none" for row in report.layers)
    assert "nothing to do" in report.warnings[0]


def test_where_no_matched_layer_carries_an_adapter_it_says_so() -> None:
    with pytest.raises(LoraInitError, match="none carries one"):
        cases.start(cases.LLAMA.adapted(), ABMLoRA(solver="local"), data=cases.LLAMA.batches())
