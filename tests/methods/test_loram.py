"""LoRAM: golden values of the authors' code, and the properties that its formulas promise."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import golden
from lorainit import (
    Gaussian,
    InitAB,
    Kaiming,
    LoraInitError,
    LoRAM,
    MiLoRA,
    OLoRA,
    Orthogonal,
    PiSSA,
    UnsupportedLayerError,
    get_method,
)
from lorainit.methods import Factors, loram, pissa
from matrices import best, normal, orthonormal

# out, in, rank
SHAPES = {"tall": (48, 20, 5), "wide": (20, 48, 2), "square": (24, 24, 8), "full-rank": (9, 12, 9)}
shapes = pytest.mark.parametrize(("n", "m", "r"), SHAPES.values(), ids=SHAPES)
statistics = pytest.mark.parametrize("statistic", ["mean_square", "variance"])
close = partial(assert_close, rtol=1e-5, atol=1e-6)  # factors are float32


def magnitude(matrix: torch.Tensor, statistic: str) -> float:
    matrix = matrix.double()
    return float(matrix.var() if statistic == "variance" else matrix.square().mean())


def product(start: Factors) -> torch.Tensor:
    return start.B.double() @ start.A.double()


def beta(start: Factors) -> float:
    return float(start.A[0].double().norm())


def weight_like(n: int, m: int, *, mean: float = 0.0) -> torch.Tensor:
    return (0.1 * normal(n, m) + mean).float()


# --- golden values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden.cases("loram"))
def test_variance_mode_matches_the_authors_code(case):
    W, scaling = case.tensors["weight"], case.options["scaling"]
    A, B = loram.factors(W, case.options["r"], statistic="variance")
    residual = (W.float() - scaling * B @ A).to(W.dtype)
    gaps = {
        "lora_A entries": golden.entries(A, case.tensors["lora_A"]),
        "lora_B entries": golden.entries(B, case.tensors["lora_B"]),
        "base_weight entries": golden.entries(residual, case.tensors["base_weight"]),
        "function": golden.function(case.tensors["base_weight"], A, B, scaling, W),
    }
    assert gaps.keys() == case.tolerances.keys()
    assert {name: gap for name, gap in gaps.items() if gap > case.tolerances[name]} == {}


@pytest.mark.parametrize("case", golden.cases("loram"))
def test_both_statistics_give_the_recorded_beta(case):
    recorded = {"variance": "beta", "mean_square": "beta_if_mean_square_were_used"}
    for statistic, key in recorded.items():
        start = loram.factors(case.tensors["weight"], case.options["r"], statistic=statistic)
        assert beta(start) == pytest.approx(case.derived[key], rel=2e-6)


# --- the sine basis ---------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 40), data=st.data())
def test_basis_is_the_orthonormal_sine_transform(size, data):
    rank = data.draw(st.integers(1, size))
    formula = torch.tensor(
        [
            [math.sqrt(2 / (size + 1)) * math.sin((i + 1) * (k + 1) * math.pi / (size + 1)) for k in range(rank)]
            for i in range(size)
        ],
        dtype=torch.float64,
    )
    basis = loram.dst_basis(size, rank)
    assert_close(basis, formula, rtol=0, atol=1e-13)
    assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-13)
    assert_close(loram.dst_column_sums(size, rank), basis.sum(0), rtol=0, atol=1e-12)


def test_basis_of_a_large_layer_keeps_float64_digits():
    # phases in float32 would be off by 1e-6 here
    basis = loram.dst_basis(50_021, 24)
    assert_close(basis.mT @ basis, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)


def test_basis_product_is_a_difference_of_dirichlet_kernels():
    n, m, r = 17, 26, 5
    a = torch.arange(1, n + 1, dtype=torch.float64)[:, None] * math.pi / (n + 1)
    b = torch.arange(1, m + 1, dtype=torch.float64) * math.pi / (m + 1)

    def kernel(x: torch.Tensor) -> torch.Tensor:
        value = torch.sin((r + 0.5) * x) / (2 * torch.sin(x / 2)) - 0.5
        return torch.where(x == 0, float(r), value)

    expected = (kernel(a - b) - kernel(a + b)) / math.sqrt((n + 1) * (m + 1))
    assert_close(loram.dst_basis(n, r) @ loram.dst_basis(m, r).mT, expected, rtol=0, atol=1e-13)


@given(
    n=st.integers(3, 40), m=st.integers(3, 40), data=st.data(), statistic=st.sampled_from(["mean_square", "variance"])
)
def test_basis_power_in_order_r_equals_that_of_the_explicit_product(n, m, data, statistic):
    r = data.draw(st.integers(1, min(n, m)))
    explicit = loram.dst_basis(n, r) @ loram.dst_basis(m, r).mT
    assert loram.basis_power(n, m, r, statistic) == pytest.approx(magnitude(explicit, statistic), rel=1e-9)


@pytest.mark.parametrize(
    ("r", "ratio"), [(2, 1.105), (4, 1.058), (8, 1.030), (16, 1.015), (32, 1.008), (64, 1.004), (128, 1.002)]
)
def test_variance_raises_beta_by_the_documented_factor_at_4096(r, ratio):
    mean_square, variance = (loram.basis_power(4096, 4096, r, s) for s in ("mean_square", "variance"))
    assert (mean_square / variance) ** 0.25 == pytest.approx(ratio, abs=6e-4)


# --- magnitudes -------------------------------------------------------------------------------------------------------


@statistics
@pytest.mark.parametrize("mean", [0.0, 100.0], ids=["centred", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weight_power_is_accumulated_in_float64(statistic, mean, dtype):
    W = (normal(31, 17) + mean).to(dtype)
    assert loram.weight_power(W, statistic) == pytest.approx(magnitude(W, statistic), rel=1e-10)


@statistics
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_weight_power_of_a_large_weight_keeps_its_digits(statistic, mean):
    W = (normal(310, 330) + mean).float()
    expected = pytest.approx(magnitude(W, statistic), rel=1e-7)
    assert loram.weight_power(W, statistic) == expected
    assert loram.weight_power(W, statistic, norm=float(W.double().norm())) == expected


@statistics
def test_product_power_equals_that_of_the_dense_product(statistic):
    start = Factors(normal(4, 15) + 1, normal(22, 4, seed=1) + 1)
    assert loram.product_power(start, statistic) == pytest.approx(magnitude(product(start), statistic), rel=1e-10)


@pytest.mark.parametrize("constant", [0.0, 0.1, -0.02, 1.7, 1e4])
def test_variance_of_a_constant_weight_is_exactly_zero(constant):
    # a rounding error left here would become a start, enlarged by the fourth root
    assert loram.weight_power(torch.full((24, 16), constant), "variance") == 0
    assert loram.weight_power(torch.full((310, 330), constant), "variance") == 0


# --- the start --------------------------------------------------------------------------------------------------------


@shapes
@statistics
def test_start_is_beta_times_orthonormal_bases(n, m, r, statistic):
    W = weight_like(n, m, mean=0.02)
    start = loram.factors(W, r, statistic=statistic)
    Q = math.log(r) / math.log(min(n, m))
    power = magnitude(loram.dst_basis(n, r) @ loram.dst_basis(m, r).mT, statistic)
    b = (Q * magnitude(W, statistic) / power) ** 0.25
    close(start.A, (b * loram.dst_basis(m, r).mT).float())
    close(start.B, (b * loram.dst_basis(n, r)).float())
    close(start.A @ start.A.mT, b**2 * torch.eye(r))
    close(start.B.mT @ start.B, b**2 * torch.eye(r))
    close(torch.linalg.svdvals(product(start))[:r], torch.full((r,), b**2, dtype=torch.float64))


@shapes
@statistics
def test_product_has_the_gain_times_the_magnitude_of_the_weight(n, m, r, statistic):
    W = weight_like(n, m, mean=0.02)
    Q = math.log(r) / math.log(min(n, m))  # 1 at full rank
    got = magnitude(product(loram.factors(W, r, statistic=statistic)), statistic)
    assert got == pytest.approx(Q * magnitude(W, statistic), rel=1e-5)


@shapes
def test_magnitude_law(n, m, r):
    """k₁ = r(m ν[A]² + n ν[B]²) = Q (m + n) ν[W]: what the first steps' update grows with."""
    W = weight_like(n, m)
    A, B = loram.factors(W, r)
    k1 = r * (m * magnitude(A, "mean_square") ** 2 + n * magnitude(B, "mean_square") ** 2)
    assert k1 == pytest.approx(loram.spectral_gain(n, m, r) * (m + n) * magnitude(W, "mean_square"), rel=1e-5)


def test_svd_gain_gives_the_magnitude_law_of_pissa():
    n, m, r = 30, 22, 4
    W = normal(n, m)
    laws = [
        r * (m * magnitude(A, "mean_square") ** 2 + n * magnitude(B, "mean_square") ** 2)
        for A, B in (loram.factors(W, r, gain="svd"), pissa.factors(W, r, 1.0, exact=True))
    ]
    assert laws[0] == pytest.approx(laws[1], rel=1e-5)


@given(n=st.integers(2, 20), m=st.integers(2, 20), data=st.data(), seed=st.integers(0, 99))
def test_svd_gain_is_at_most_the_captured_energy(n, m, data, seed):
    r = data.draw(st.integers(1, min(n, m)))
    W = normal(n, m, seed=seed)
    energy = float(best(W, r).square().sum() / W.square().sum())
    assert 0 < loram.svd_gain(W, r) <= energy * (1 + 1e-12)


def test_svd_gain_takes_half_precision_weights():
    W = weight_like(20, 12).bfloat16()
    assert loram.svd_gain(W, 3) == loram.svd_gain(W.float(), 3)


@pytest.mark.parametrize(
    ("gain", "rank", "expected"),
    [("log", 8, math.log(8) / math.log(20)), ("log_half", 8, math.log(4) / math.log(20)), ("log", 20, 1.0)],
)
def test_gain_options_scale_the_product(gain, rank, expected):
    W = weight_like(32, 20)
    assert float(product(loram.factors(W, rank, gain=gain)).norm() / W.norm()) == pytest.approx(expected**0.5, rel=1e-5)


# --- invariances ------------------------------------------------------------------------------------------------------


def test_lower_ranks_are_prefixes_of_higher_ones():
    W = weight_like(40, 30)
    low, high = loram.factors(W, 3), loram.factors(W, 11)
    close(low.A / beta(low), high.A[:3] / beta(high))
    close(low.B / beta(low), high.B[:, :3] / beta(high))


@statistics
def test_transposed_weight_swaps_the_factors(statistic):
    W = weight_like(40, 30, mean=0.02)
    start, swapped = (loram.factors(w, 5, statistic=statistic) for w in (W, W.mT))
    close(swapped.A, start.B.mT)
    close(swapped.B, start.A.mT)


def test_square_layer_has_mirrored_factors():
    start = loram.factors(weight_like(24, 24), 5)
    assert torch.equal(start.B, start.A.mT)


@statistics
@pytest.mark.parametrize("c", [0.01, -3.0, 1e4])
def test_scaling_the_weight_scales_beta_by_the_root(c, statistic):
    W = weight_like(20, 30, mean=0.02)
    plain, scaled = (loram.factors(w, 4, statistic=statistic) for w in (W, c * W))
    assert beta(scaled) == pytest.approx(math.sqrt(abs(c)) * beta(plain), rel=1e-6)


@pytest.mark.parametrize(
    ("move", "statistic"),
    [
        pytest.param(lambda W: W.flip(0), "variance", id="rows-variance"),
        pytest.param(lambda W: W.flip(0, 1), "mean_square", id="rows-and-columns-mean-square"),
        pytest.param(lambda W: orthonormal(20, 20) @ W, "mean_square", id="rotated-outputs"),
        pytest.param(lambda W: W @ orthonormal(30, 30), "mean_square", id="rotated-inputs"),
    ],
)
def test_start_ignores_permutations_and_rotations(move, statistic):
    W = normal(20, 30) + 0.2
    start, moved = (loram.factors(w, 4, statistic=statistic) for w in (W, move(W)))
    close(moved.A, start.A)
    close(moved.B, start.B)


def test_rotation_does_move_the_variance():
    # the mean is what the variance removes, and a rotation moves it: the two statistics are not interchangeable
    W = normal(20, 30) + 0.5
    start, moved = (loram.factors(w, 4, statistic="variance") for w in (W, orthonormal(20, 20) @ W))
    assert beta(moved) > 1.01 * beta(start)


@pytest.mark.parametrize("options", [{"alpha": 64}, {"alpha": 1}, {"use_rslora": True}], ids=str)
def test_start_ignores_alpha_and_rslora(site, generator, options):
    W = weight_like(20, 30)
    start = LoRAM().start(site(W, 4, **options), generator)
    assert torch.equal(start.A, loram.factors(W, 4).A)
    assert torch.equal(start.B, loram.factors(W, 4).B)


@statistics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weight_starts_as_its_float32_copy(site, generator, statistic, dtype):
    W = weight_like(20, 30, mean=0.02).to(dtype)
    start = LoRAM(statistic=statistic).start(site(W, 4), generator)
    expected = loram.factors(W.float(), 4, statistic=statistic)
    close(start.A, expected.A)
    close(start.B, expected.B)
    assert start.A.dtype == start.B.dtype == torch.float32


def test_pure_function_and_method_agree(site, generator):
    W = weight_like(20, 30, mean=0.02)
    for options in ({}, {"statistic": "variance"}, {"gain": "log_half"}, {"gain": "svd", "statistic": "variance"}):
        start = LoRAM(**options).start(site(W, 4), generator)
        close(start.A, loram.factors(W, 4, **options).A)
        close(start.B, loram.factors(W, 4, **options).B)


# --- training ---------------------------------------------------------------------------------------------------------


def test_first_gradient_step_projects_the_gradient_on_both_bases():
    n, m, r, s, lr = 18, 14, 3, 1.7, 0.3
    G = normal(n, m, seed=1)
    start = loram.factors(normal(n, m), r)
    A, B = (factor.double().requires_grad_() for factor in start)
    (G * (s * B @ A)).sum().backward()
    assert A.grad is not None and B.grad is not None
    assert bool(A.grad.any()) and bool(B.grad.any())  # neither factor waits for the other
    step = -lr * s * (B @ A.grad + B.grad @ A)
    Pn, Pm = (basis @ basis.mT for basis in (loram.dst_basis(n, r), loram.dst_basis(m, r)))
    close(step.detach(), -lr * s**2 * beta(start) ** 2 * (Pn @ G + G @ Pm))


def test_first_step_on_a_white_gradient_has_the_exact_expected_magnitude():
    """E ν[ΔW] = η²σ² Q ν[W] (m + n + 2r): the mean over white G is the squared norm of the linear map G ↦ ΔW."""
    n, m, r = 9, 7, 3
    W = normal(n, m)
    A, B = (factor.double() for factor in loram.factors(W, r))
    step = torch.kron(B @ B.mT, torch.eye(m)) + torch.kron(torch.eye(n), A.mT @ A)
    Q = loram.spectral_gain(n, m, r)
    expected = Q * magnitude(W, "mean_square") * (m + n + 2 * r)
    assert float(step.square().sum()) / (n * m) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "power"),
    [pytest.param(torch.optim.SGD, 2, id="sgd"), pytest.param(partial(torch.optim.Adam, eps=0), 1, id="adam")],
)
def test_scaling_equivalence(optimizer, power):
    """Multiplier α = α'ab ≡ multiplier α' from aA, bB with rates a^p·η_A, b^p·η_B: p = 2 for SGD, 1 for Adam."""
    n, m, r, a, b, alpha = 12, 10, 3, 1.9, 0.6, 2.0
    X, Y = normal(m, 30, seed=1), normal(n, 30, seed=2)
    start = loram.factors(normal(n, m), r)

    def trajectory(alpha: float, a: float, b: float) -> torch.Tensor:
        A, B = (a * start.A.double()).requires_grad_(), (b * start.B.double()).requires_grad_()
        groups = [{"params": [A], "lr": 1e-3 * a**power}, {"params": [B], "lr": 2e-3 * b**power}]
        steps, updates = optimizer(groups, lr=1.0), []
        for _ in range(40):
            steps.zero_grad()
            (alpha * B @ A @ X - Y).square().mean().backward()
            steps.step()
            updates.append((alpha * B @ A).detach())
        return torch.stack(updates)

    plain, rescaled = trajectory(alpha, 1.0, 1.0), trajectory(alpha / (a * b), a, b)
    assert float((plain[-1] - plain[0]).norm()) > 1e-3 * float(plain[0].norm())  # it does move
    assert_close(rescaled, plain, rtol=1e-11, atol=1e-12)


# --- tracking and random controls -------------------------------------------------------------------------------------


@statistics
@pytest.mark.parametrize("basis", ["dst", "orthogonal", "gaussian"])
@pytest.mark.parametrize("reference", [PiSSA(exact=True), MiLoRA(), OLoRA(), InitAB()], ids=lambda r: r.info.name)
def test_tracking_takes_the_magnitude_of_the_reference(site, statistic, basis, reference):
    """Whatever the directions are, random ones included: that is what makes them a matched control."""
    layer = site(weight_like(30, 20, mean=0.02), 4, alpha=8)
    method = LoRAM(reference=reference, statistic=statistic, basis=basis)
    start, tracked = (x.start(layer, torch.Generator().manual_seed(0)) for x in (method, reference))
    assert magnitude(product(start), statistic) == pytest.approx(magnitude(product(tracked), statistic), rel=1e-5)


def test_tracking_works_at_rank_one_where_the_gain_would_be_zero(site, generator):
    layer = site(weight_like(30, 20), 1)
    start = LoRAM(reference=PiSSA(exact=True)).start(layer, generator)
    assert float(product(start).norm()) == pytest.approx(float(torch.linalg.svdvals(layer.weight())[0]), rel=1e-5)


@pytest.mark.parametrize("reference", [Kaiming(), Gaussian(), Orthogonal()], ids=lambda r: r.info.name)
def test_reference_without_a_product_is_refused_when_the_method_is_made(reference):
    # for Orthogonal, BA is rounding noise, and its fourth root would pass for a start
    with pytest.raises(ValueError, match=f"'{reference.info.name}' starts with BA = 0"):
        LoRAM(reference=reference)


@pytest.mark.parametrize(("basis", "orthonormal_rows"), [("orthogonal", True), ("gaussian", False)])
def test_random_bases_are_seeded_and_match_the_magnitude(site, basis, orthonormal_rows):
    W = weight_like(30, 20)
    first, again, other = (
        LoRAM(basis=basis).start(site(W, 4), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.A, again.A) and torch.equal(first.B, again.B)
    assert not torch.allclose(first.A, other.A)
    Q = loram.spectral_gain(30, 20, 4)
    assert float(product(first).norm() / W.norm()) == pytest.approx(Q**0.5, rel=1e-5)
    gram = first.A @ first.A.mT
    assert torch.allclose(gram, gram[0, 0] * torch.eye(4), atol=1e-5) is orthonormal_rows


@pytest.mark.parametrize("basis", ["dst", "orthogonal", "gaussian"])
def test_factors_of_an_oblong_layer_are_equally_large(site, generator, basis):
    # columns of norm 1, or 1 in expectation: without that the larger side would get the larger factor
    A, B = LoRAM(basis=basis).start(site(weight_like(800, 50), 8), generator)
    assert float(A.norm() / B.norm()) == pytest.approx(1, rel=0.1 if basis == "gaussian" else 1e-5)


def test_random_bases_need_a_generator():
    with pytest.raises(ValueError, match="needs a generator"):
        loram.basis_pair(8, 6, 2, basis="orthogonal")


# --- guards -----------------------------------------------------------------------------------------------------------

ONES, NAN = torch.ones(8, 6), torch.full((8, 6), torch.nan)


@pytest.mark.parametrize(
    ("weight", "rank", "options", "message"),
    [
        pytest.param(ONES, 0, {}, "rank 0 is not between 1 and", id="rank-0"),
        pytest.param(ONES, 7, {}, "rank 7 is not between 1 and .* = 6", id="rank-above-min"),
        pytest.param(ONES, 1, {}, "dead .* gain 0 at rank 1", id="rank-1"),
        pytest.param(ONES, 1, {"gain": "log_half"}, "dead", id="rank-1-log-half"),
        pytest.param(ONES, 2, {"gain": "log_half"}, "dead", id="rank-2-log-half"),
        pytest.param(torch.ones(1, 6), 1, {}, "dead", id="one-output"),
        pytest.param(0 * ONES, 3, {}, "dead", id="zero"),
        pytest.param(0 * ONES, 3, {"gain": "svd"}, "dead", id="zero-svd"),
        pytest.param(0.3 * ONES, 3, {"statistic": "variance"}, "dead", id="constant-variance"),
        pytest.param(NAN, 3, {}, "is nan", id="nan"),
        pytest.param(torch.eye(2), 1, {"statistic": "variance", "gain": "svd"}, "unbounded", id="constant-basis"),
        pytest.param(ONES, 3, {"statistic": "var"}, "statistic='var' is not one of", id="unknown-statistic"),
        pytest.param(ONES, 3, {"gain": "tracking"}, "gain='tracking' is not one of", id="unknown-gain"),
    ],
)
def test_pure_function_refuses(weight, rank, options, message):
    with pytest.raises(ValueError, match=message):
        loram.factors(weight, rank, **options)


@pytest.mark.parametrize(
    ("method", "weight", "rank", "message"),
    [
        pytest.param(LoRAM(), ONES, 7, "rank 7 exceeds", id="rank-above-min"),
        pytest.param(LoRAM(), ONES, 1, "gain is zero at rank 1", id="rank-1"),
        pytest.param(LoRAM(gain="log_half"), ONES, 2, "gain is zero at rank 2", id="rank-2-log-half"),
        pytest.param(LoRAM(), 0 * ONES, 3, "dead", id="zero"),
        pytest.param(LoRAM(gain="svd"), 0 * ONES, 3, "dead", id="zero-svd"),
        pytest.param(LoRAM(statistic="variance"), ONES, 3, "dead", id="constant-variance"),
        pytest.param(LoRAM(reference=PiSSA(exact=True)), 0 * ONES, 3, "the reference is 0", id="zero-reference"),
        pytest.param(LoRAM(statistic="variance", rank_one="as_two"), torch.eye(2), 1, "unbounded", id="constant-basis"),
    ],
)
def test_method_refuses_and_names_the_layer(site, generator, method, weight, rank, message):
    with pytest.raises(UnsupportedLayerError, match=f"'block.proj'.*{message}"):
        method.start(site(weight, rank), generator)


@pytest.mark.parametrize(
    ("shape", "rank", "gain", "expected"),
    [
        pytest.param((30, 20), 1, "log", math.log(2) / math.log(20), id="rank-1"),
        pytest.param((30, 20), 2, "log", math.log(2) / math.log(20), id="rank-2-as-ever"),
        pytest.param((30, 20), 1, "log_half", math.log(2) / math.log(20), id="log-half-rank-1"),
        pytest.param((30, 20), 2, "log_half", math.log(2) / math.log(20), id="log-half-rank-2"),
        pytest.param((1, 20), 1, "log", 1.0, id="one-output"),
        pytest.param((20, 1), 1, "log", 1.0, id="one-input"),
    ],
)
def test_rank_one_as_two(site, generator, shape, rank, gain, expected):
    W = weight_like(*shape)
    start = LoRAM(rank_one="as_two", gain=gain).start(site(W, rank), generator)
    assert float(product(start).norm() / W.norm()) == pytest.approx(expected**0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"statistic": "var"}, ValueError),
        ({"gain": "tracking"}, ValueError),
        ({"basis": "dct"}, ValueError),
        ({"rank_one": True}, ValueError),
        ({"reference": "pissa"}, TypeError),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_wrong_options_are_refused_when_the_method_is_made(options, error):
    [(name, value)] = options.items()
    with pytest.raises(error, match=name):
        LoRAM(**options)
    with pytest.raises(LoraInitError, match=f"'loram': .*{name}.*{re.escape(repr(value))}"):
        get_method("loram", **options)
