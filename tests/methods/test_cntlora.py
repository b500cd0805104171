"""CNTLoRA's reconstruction: truncation, few data, the guard and the method; `test_shift.py` has the constraints.

P3, P5 and P10 are the properties of the design's method page; oracles are dense float64.
"""

from __future__ import annotations

import math
import warnings
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inputs import damped, inputs, known, power, second_moment, sums
from lorainit import UnsupportedLayerError
from lorainit.methods import cntlora
from lorainit.methods.cntlora import CNTLoRA, delta, energies, factors
from lorainit.methods.parts.shift import Constraint
from matrices import best, decaying, normal, with_spectrum

M, N = 14, 10
X = inputs(300, N)
PROXY = inputs(300, N, seed=7, spread=5.0)
CONSTRAINTS = get_args(Constraint)
constraints = pytest.mark.parametrize("constraint", CONSTRAINTS)
metrics = pytest.mark.parametrize("metric", ["data", "frobenius"])
moments = pytest.mark.parametrize("moment", ["second", "centred"])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert float((actual - expected).norm()) <= tolerance * max(1.0, float(expected.norm()))


# --- P3: truncation ---------------------------------------------------------------------------------------------------


@constraints
@metrics
@given(m=st.integers(1, 12), n=st.integers(2, 12), data=st.data(), s=st.sampled_from([0.25, 2.0]))
def test_factors_are_the_best_of_their_rank_in_their_metric(constraint, metric, m, n, data, s):
    rank = data.draw(st.integers(1, min(m, n)))
    x, W = inputs(60, n, seed=2), normal(m, n)
    options = {"constraint": constraint, **known(x, inputs(60, n, seed=8, spread=4.0))}
    C, change = second_moment(x), delta(W, second_moment(x), **options)
    with warnings.catch_warnings():  # of F5, which has rank one, and of F1 in the Frobenius metric
        warnings.simplefilter("ignore")
        A, B = factors(W, C, rank, s, metric=metric, exact=True, **options)
        spectrum = energies(W, C, metric=metric, **options)
    weight = power(damped(C), 0.5) if metric == "data" else torch.eye(n, dtype=torch.float64)
    S = torch.linalg.svdvals(change @ weight)
    close(spectrum, S**2)
    close((change - s * B @ A) @ weight, change @ weight - best(change @ weight, rank))
    left = float(((change - s * B @ A) @ weight).square().sum())
    assert left == pytest.approx(float((S[rank:] ** 2).sum()), abs=1e-10 * float((S**2).sum()))
    expected = torch.diag(S[:rank] / s)
    close(B.mT @ B, expected)
    alive = int((S[:rank] > 1e-9 * S[0]).sum())
    right = (A @ weight)[:alive]
    close(right @ right.mT, expected[:alive, :alive])


def test_randomized_truncation_is_nearly_as_good_and_seeded():
    x, W = inputs(400, 60), decaying(80, 60, 0.5)
    C, options = second_moment(x), {"generator": torch.Generator().manual_seed(3)}
    change, root = delta(W, C), power(damped(C), 0.5)
    runs = [factors(W, C, 6, 2.0, **o) for o in ({}, {}, options)]
    assert torch.equal(runs[0].A, runs[1].A) and not torch.equal(runs[0].A, runs[2].A)
    captured, optimal = (float((p @ root).square().sum()) for p in (2.0 * runs[0].B @ runs[0].A, change))
    best_captured = float((torch.linalg.svdvals(change @ root)[:6] ** 2).sum())
    assert optimal > best_captured >= captured >= 0.99 * best_captured


def test_data_metric_leaves_directions_without_data_alone():
    x = inputs(2000, 24, spread=1e4, mean=0.0)  # condition number of C: 1e8
    W, C = normal(30, 24), second_moment(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        starts = {m: factors(W, C, 6, 1.0, metric=m, damping=1e-9, exact=True) for m in ("data", "frobenius")}
    quiet = torch.linalg.eigh(C).eigenvectors[:, :8]  # a third of the directions
    change = delta(W, C, damping=1e-9)
    errors = {}
    for metric, (A, B) in starts.items():
        rows = torch.linalg.svd(B @ A, full_matrices=False).Vh[:6]
        errors[metric] = float(((change - B @ A) @ power(C, 0.5)).norm() / (change @ power(C, 0.5)).norm())
        if metric == "frobenius":
            assert float((rows @ quiet).square().sum()) > 0.9 * 6
    assert errors["data"] < 0.7 * errors["frobenius"]


@pytest.mark.parametrize("options", [{}, {"metric": "data"}, {"metric": "frobenius", "top_k": 4}], ids=str)
def test_only_the_pathological_combination_warns(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factors(normal(M, N), second_moment(X), 3, 1.0, **options)
    with pytest.warns(UserWarning, match="no top_k spends the rank on directions that the data lack"):
        factors(normal(M, N), second_moment(X), 3, 1.0, metric="frobenius")


# --- P10 and top_k: where there are no data ---------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", ["F2", "F3"])
@metrics
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_rows_lie_in_the_span_of_few_inputs(constraint, metric, damping):
    x, W = inputs(4, N), normal(M, N)
    options = {"constraint": constraint, "metric": metric, "damping": damping}
    full, low = (factors(W, second_moment(x), 4, 2.0, exact=True, top_k=k, **options) for k in (None, 4))
    span = torch.linalg.svd(x, full_matrices=False).Vh
    close(full.A @ span.mT @ span, full.A)
    close(low.B @ low.A, full.B @ full.A)
    change = delta(W, second_moment(x), constraint=constraint, damping=damping)
    assert int(torch.linalg.matrix_rank(change, rtol=1e-10)) == 4
    close(2.0 * full.B @ full.A, change)


def test_more_rank_than_directions_is_padded_and_reported():
    with pytest.warns(UserWarning, match="only 2 of 5 components are above rounding"):
        A, B = factors(normal(M, N), second_moment(X), 5, 1.0, top_k=2)
    assert bool((A[2:] != 0).all()) and float(A[2:].abs().max()) <= N**-0.5 and not B[:, 2:].any()


@constraints
@metrics
@moments
@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fewer_tokens_than_inputs_and_dead_inputs_give_finite_factors(constraint, metric, moment, damping, dtype):
    x = inputs(5, N)
    x[:, 3] = 0
    W = normal(M, N, dtype=dtype)
    options = {name: tensor.to(dtype) for name, tensor in known(x, inputs(5, N, seed=3)).items()}
    A, B = factors(
        W,
        second_moment(x).to(dtype),
        4,
        2.0,
        constraint=constraint,
        metric=metric,
        moment=moment,
        damping=damping,
        drift=0.01,
        **options,
    )
    assert A.shape == (4, N) and B.shape == (M, 4) and A.dtype == B.dtype == dtype
    assert bool(A.isfinite().all() and B.isfinite().all())


@constraints
@metrics
def test_nothing_happens_outside_the_leading_directions(constraint, metric):
    W, C = normal(M, N), second_moment(X)
    options = {"constraint": constraint, **known(X, PROXY)}
    P = torch.linalg.eigh(C).eigenvectors[:, -4:]
    limited = delta(W, C, top_k=4, **options)
    close(limited, delta(W, C, **options) @ P @ P.mT)
    rank = 1 if constraint == "F5" else 4
    A, B = factors(W, C, rank, 1.0, metric=metric, exact=True, top_k=4, **options)
    close(B @ A, limited)
    close(delta(W, C, top_k=99, **options), delta(W, C, **options))


@metrics
def test_start_without_a_shift_is_plain_lora_and_says_so(metric):
    with pytest.warns(UserWarning, match="only 0 of 3 components are above rounding"):
        A, B = factors(
            normal(M, N), 2.0 * torch.eye(N, dtype=torch.float64), 3, 1.0, metric=metric, drift=0.01, top_k=9
        )
    assert not B.any() and bool((A != 0).all())


# --- P5: the guard ----------------------------------------------------------------------------------------------------


def energy(change: torch.Tensor, x: torch.Tensor = X) -> float:
    return float((x @ change.mT).square().sum())


@constraints
@metrics
@moments
@pytest.mark.parametrize("scaling", [0.5, 4.0])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_guard_bounds_the_energy_of_the_step_and_keeps_its_direction(constraint, metric, moment, scaling):
    W, C = normal(M, N), second_moment(X)
    options = {"constraint": constraint, "metric": metric, "moment": moment, "exact": True, **known(X, PROXY)}
    free = factors(W, C, 3, scaling, **options)
    step = scaling * free.B @ free.A
    for drift in (1e-3, 1e3):
        A, B = factors(W, C, 3, scaling, drift=drift, **options)
        shrink = min(1.0, math.sqrt(drift * energy(W) / energy(step)))
        assert drift > 1 or shrink < 1
        assert energy(scaling * B @ A) == pytest.approx(min(energy(step), drift * energy(W)))
        close(scaling * B @ A, shrink * step)
        rows = 1 if constraint == "F5" else 3  # the rest is padding
        close(A[:rows], math.sqrt(shrink) * free.A[:rows])


# --- the method -------------------------------------------------------------------------------------------------------


def test_method_turns_sums_into_means_and_passes_its_options_on(site):
    layer = site(normal(M, N), 3, alpha=6)
    W, C = layer.weight(), second_moment(X)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    for options in (
        {},
        {"drift": None},
        {"drift": 1e-4, "damping": 0.1, "exact": True},
        {"moment": "centred", "top_k": 5},
        {"constraint": "F4", "metric": "frobenius"},
        {"constraint": "F1p", "map": "coral"},
        {"constraint": "F3"},
    ):
        method = CNTLoRA(**options)
        proxy = sums(PROXY) if options.get("constraint") == "F1p" else None
        got = method.start(layer, seeded(), sums(X), proxy)
        drift = None if method.constraint == "F3" else {"drift": 0.01, **options}["drift"]
        other = {k: v for k, v in known(X, PROXY).items() if proxy is not None or k == "input_mean"}
        chosen = {"moment": "centred", **options, **other, "drift": drift}
        expected = factors(W, C, 3, 2.0, generator=seeded(), **chosen)
        close(got.A, expected.A)
        close(got.B, expected.B)
        wanted = {k: v for k, v in options.items() if k not in ("drift", "exact")}
        close(method.energies(layer, sums(X), proxy), energies(W, C, **{"moment": "centred", **wanted, **other}))


def test_it_is_labelled_a_reconstruction_and_says_what_it_does_to_the_function():
    info = CNTLoRA.info
    assert (info.status, info.product, info.needs) == ("reconstruction", "step", ("forward",))
    assert CNTLoRA.streams == {"input_second_moment", "input_sum"}
    assert {c: CNTLoRA(constraint=c).product for c in CONSTRAINTS} == {
        c: "preserve" if c == "F3" else "step" for c in CONSTRAINTS
    }
    assert CNTLoRA(constraint="F3") == CNTLoRA(constraint="F3") != CNTLoRA()
    assert CNTLoRA(constraint="F3").info.status == "reconstruction"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraint": "F6"}, "constraint='F6' is not one of"),
        ({"moment": "third"}, "moment='third' is not one of"),
        ({"metric": "max"}, "metric='max' is not one of"),
        ({"map": "linear"}, "map='linear' is not one of"),
        ({"damping": -1.0}, "damping must be ≥ 0"),
        ({"damping": float("nan")}, "damping must be ≥ 0"),
        ({"top_k": 0}, "top_k ≥ 1"),
        ({"drift": 0.0}, "drift > 0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_when_the_method_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        CNTLoRA(**options)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        pytest.param(torch.zeros(5, N, dtype=torch.float64), {}, "its inputs are all zero", id="zero"),
        pytest.param(X[:0], {}, "saw no tokens", id="no-tokens"),
        pytest.param(X, {"constraint": "F1p"}, "'F1p' needs .* proxy", id="no-proxy"),
    ],
)
def test_layer_that_cannot_be_started_is_refused_by_name(site, generator, x, options, message):
    with pytest.raises(UnsupportedLayerError, match=f"'block.proj'.*{message}"):
        CNTLoRA(**options).start(site(normal(M, N), 3), generator, sums(x))


def test_inputs_that_do_not_vary_show_no_shift(site, generator):
    layer, constant = site(normal(M, N), 3), sums(X[:1].expand(7, N))
    with pytest.warns(UserWarning, match="its inputs do not vary"):
        A, B = CNTLoRA().start(layer, generator, constant)
    assert A.abs().max() > 0 and not B.any()
    assert not CNTLoRA().energies(layer, constant).any()
    with pytest.raises(ValueError, match="do not vary"):
        delta(layer.weight(), second_moment(X[:1].expand(7, N)), moment="centred", input_mean=X[0])


def test_rank_and_drift_out_of_range_are_refused(site, generator):
    with pytest.raises(ValueError, match="rank 11 is not between"):
        factors(normal(M, N), second_moment(X), 11, 1.0)
    with pytest.raises(ValueError, match="drift must be > 0"):
        factors(normal(M, N), second_moment(X), 3, 1.0, drift=0.0)
    with pytest.raises(ValueError, match="metric='max' is not one of"):
        factors(normal(M, N), second_moment(X), 3, 1.0, metric="max")
    with pytest.raises(UnsupportedLayerError, match="'block.proj': rank 11 exceeds"):
        CNTLoRA().start(site(normal(M, N), 11), generator, sums(X))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weight_of_low_rank_limits_the_components():
    W = with_spectrum(M, N, [2.0, 1.0])
    A, B = factors(W, second_moment(X), 4, 1.0)
    assert not B[:, 2:].any() and bool(A.any(dim=1).all())
    close(cntlora.delta(W, second_moment(X)), B @ A)
