"""The constraints of CNTLoRA's reconstruction: each estimate solves its own, against dense float64 oracles.

P6 to P9 are the properties of the design's method page.
"""

from __future__ import annotations

import warnings
from typing import get_args

import pytest
import torch

from inputs import damped, inputs, known, power, second_moment
from lorainit.methods.cntlora import delta
from lorainit.methods.parts.shift import Constraint
from matrices import normal, orthonormal, with_spectrum

M, N = 14, 10
X = inputs(300, N)
PROXY = inputs(300, N, seed=7, spread=5.0)
constraints = pytest.mark.parametrize("constraint", get_args(Constraint))
moments = pytest.mark.parametrize("moment", ["second", "centred"])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert float((actual - expected).norm()) <= tolerance * max(1.0, float(expected.norm()))


# --- P6: the constraints hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "W",
    [normal(6, N), normal(N, N), normal(M, N), with_spectrum(M, N, [3.0, 2.0, 1.0])],
    ids=["wide", "square", "tall", "low"],
)
@pytest.mark.parametrize("damping", [0.0, 1e-2])
@moments
@pytest.mark.parametrize("constraint", ["F1", "F4"])
def test_output_moment_is_that_of_white_inputs_of_the_same_power(W, damping, moment, constraint):
    C = second_moment(X)
    moved = W + delta(W, C, constraint=constraint, damping=damping, moment=moment, input_mean=X.mean(0))
    used = damped(C if moment == "second" else torch.cov(X.mT, correction=0), damping)
    close(moved @ used @ moved.mT, used.diagonal().mean() * W @ W.mT)


def test_output_side_solution_is_another_one_and_the_transport_between_output_moments():
    W, C = normal(6, N), second_moment(X)
    change = delta(W, C, constraint="F4")
    used = damped(C)
    source, target = W @ used @ W.mT, used.diagonal().mean() * W @ W.mT
    half, inverse = power(source, 0.5), power(source, -0.5)
    G = inverse @ power(half @ target @ half, 0.5) @ inverse - torch.eye(6)
    close(change, G @ W)
    assert float((change - delta(W, C)).norm()) > 0.1 * float(change.norm())


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("kind", ["transport", "coral"])
@moments
def test_output_moment_is_that_of_the_proxy_inputs(damping, kind, moment):
    W, options = normal(M, N), {"constraint": "F1p", "damping": damping, "map": kind, "moment": moment}
    moved = W + delta(W, second_moment(X), **options, **known(X, PROXY))
    C, proxy = (
        damped(second_moment(x) if moment == "second" else torch.cov(x.mT, correction=0), damping) for x in (X, PROXY)
    )
    close(moved @ C @ moved.mT, W @ proxy @ W.mT)


def test_transport_is_the_textbooks_and_moves_the_inputs_least():
    C, proxy, eye = damped(second_moment(X)), damped(second_moment(PROXY)), torch.eye(N, dtype=torch.float64)
    changes = {
        kind: delta(eye, second_moment(X), constraint="F1p", map=kind, **known(X, PROXY))
        for kind in ("transport", "coral")
    }
    half, inverse = power(C, 0.5), power(C, -0.5)
    close(changes["transport"], inverse @ power(half @ proxy @ half, 0.5) @ inverse - eye)
    close(changes["coral"], power(proxy, 0.5) @ inverse - eye)
    moved = {kind: float((change @ C @ change.mT).trace()) for kind, change in changes.items()}
    assert moved["transport"] < 0.999 * moved["coral"]


@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0])
@pytest.mark.parametrize("paired", [True, False])
@moments
def test_paired_outputs_are_the_ridge_regression(damping, paired, moment):
    x, proxy = (X, PROXY) if moment == "second" else (X - X.mean(0), PROXY - PROXY.mean(0))
    W, C = normal(M, N), second_moment(x)
    cross = second_moment(proxy, x) if paired else torch.zeros(N, N, dtype=torch.float64)
    given = known(X, PROXY) if paired else {"input_mean": X.mean(0)}
    change = delta(W, second_moment(X), constraint="F2", damping=damping, moment=moment, **given)
    close((W + change) @ C - W @ cross + damping * C.diagonal().mean() * change, torch.zeros(M, N))


def test_data_subspace_gets_the_weight_and_its_complement_nothing():
    x, W = inputs(4, N), normal(M, N)
    change = delta(W, second_moment(x), constraint="F3", damping=0.0)
    close(change @ x.mT, W @ x.mT)
    complement = torch.linalg.svd(x).Vh[4:].mT
    close(change @ complement, torch.zeros(M, N - 4))
    unpaired = delta(W, second_moment(x), constraint="F2", damping=0.0)
    close(unpaired, -change)


@pytest.mark.parametrize("proxy", [True, False])
def test_mean_output_is_that_of_the_proxy_inputs(proxy):
    W, mean = normal(M, N), X.mean(0)
    target = PROXY.mean(0) if proxy else torch.zeros(N, dtype=torch.float64)
    options = {"proxy_mean": target} if proxy else {}
    change = delta(W, second_moment(X), constraint="F5", input_mean=mean, **options)
    close((W + change) @ mean, W @ target)
    close(change, torch.outer(change @ mean, mean) / (mean @ mean))  # the least such step, of rank one


# --- P7 to P9: no shift, a known shift, equivariance ------------------------------------------------------------------


def test_no_shift_gives_no_step():
    W, C = normal(M, N), second_moment(X)
    zero = torch.zeros(M, N, dtype=torch.float64)
    for damping in (0.0, 1e-2, 1.0):
        white = 3.0 * torch.eye(N, dtype=torch.float64)
        close(delta(W, white, damping=damping), zero)
        close(delta(W, white, constraint="F4", damping=damping), zero)
        for kind in ("transport", "coral"):
            close(delta(W, C, constraint="F1p", map=kind, damping=damping, proxy_second_moment=C), zero)
        close(delta(W, C, constraint="F2", damping=damping, cross_second_moment=C), zero)
    close(delta(W, C, constraint="F5", input_mean=X.mean(0), proxy_mean=X.mean(0)), zero)


def test_known_linear_shift_is_undone():
    x_p = normal(200, N)
    x_p = x_p @ power(second_moment(x_p), -0.5)  # C_p = I exactly
    T = power(damped(second_moment(X)), 0.5)
    T = T / (T @ T).diagonal().mean().sqrt()  # so that σ = 1
    x_f, W = x_p @ T, normal(M, N)
    expected = W @ (torch.linalg.inv(T) - torch.eye(N))
    close(delta(W, second_moment(x_f), damping=0.0), expected)
    cross = second_moment(x_p, x_f)
    close(delta(W, second_moment(x_f), constraint="F2", damping=0.0, cross_second_moment=cross), expected)
    proxy = second_moment(x_p)
    close(delta(W, second_moment(x_f), constraint="F1p", damping=0.0, proxy_second_moment=proxy), expected)


@constraints
@moments
def test_rotated_inputs_rotate_the_step_and_a_scaled_weight_scales_it(constraint, moment):
    R, W = orthonormal(N, N, seed=4), normal(M, N)
    options = {"constraint": constraint, "moment": moment}
    change = delta(W, second_moment(X), **options, **known(X, PROXY))
    rotated = delta(W @ R.mT, second_moment(X @ R.mT), **options, **known(X @ R.mT, PROXY @ R.mT))
    close(rotated, change @ R.mT)
    close(delta(-3.0 * W, second_moment(X), **options, **known(X, PROXY)), -3.0 * change)


@constraints
def test_unit_of_the_inputs_has_no_influence(constraint):
    W = normal(M, N)
    change = delta(W, second_moment(X), constraint=constraint, **known(X, PROXY))
    # of both kinds of inputs: F1 and F4 do not look at the proxy
    proxy = PROXY if constraint in ("F1", "F4") else 50 * PROXY
    close(delta(W, second_moment(50 * X), constraint=constraint, **known(50 * X, proxy)), change)


# --- rounding and wrong arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damping", "raised"), [(0.0, True), (1e-15, True), (1e-2, False)])
@constraints
def test_damping_is_raised_only_where_an_inverse_needs_it_and_reported(damping, raised, constraint):
    x = inputs(4, N)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        delta(normal(M, N), second_moment(x), constraint=constraint, damping=damping, **known(x, inputs(4, N, seed=3)))
    told = [str(w.message) for w in caught]
    if raised and constraint not in ("F2", "F3"):
        assert len(told) == 1 and f"damping was raised from {damping:g} to " in told[0]
    else:
        assert not told


def test_damping_that_a_leading_part_does_not_need_is_not_raised():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta(normal(M, N), second_moment(inputs(4, N)), damping=0.0, top_k=4)


def test_float32_agrees_with_float64():
    W, C = normal(40, 32), second_moment(inputs(500, 32, spread=300.0))
    for constraint in ("F1", "F4"):
        wide, narrow = (delta(W.to(d), C.to(d), constraint=constraint) for d in (torch.float64, torch.float32))
        assert float((narrow - wide).norm() / wide.norm()) < 1e-3


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dampin": 0.1}, TypeError, "unknown options \\['dampin'\\]"),
        ({"constraint": "F6"}, ValueError, "constraint='F6' is not one of"),
        ({"moment": "third"}, ValueError, "moment='third' is not one of"),
        ({"constraint": "F1p", "proxy_second_moment": second_moment(PROXY), "map": "m"}, ValueError, "map='m' is not"),
        ({"damping": -0.1}, ValueError, "damping must be ≥ 0"),
        ({"top_k": 0}, ValueError, "top_k must be ≥ 1"),
        ({"constraint": "F1p"}, ValueError, "'F1p' needs the second moment .* proxy"),
        ({"constraint": "F5"}, ValueError, "'F5' needs the mean"),
        ({"constraint": "F5", "input_mean": torch.zeros(N)}, ValueError, "other than zero"),
        ({"moment": "centred"}, ValueError, "'centred' needs the means"),
        (
            {"moment": "centred", "input_mean": X.mean(0), "proxy_second_moment": second_moment(PROXY)},
            ValueError,
            "'centred' needs the means",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        delta(normal(M, N), second_moment(X), **options)
