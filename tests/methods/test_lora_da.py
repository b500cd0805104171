"""LoRA-DA: the authors' values, the optimality that the formula claims, and what must and must not change it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

import golden
import lorainit
from lorainit import UnsupportedLayerError
from lorainit.errors import NonFiniteError
from lorainit.methods import lora_da
from lorainit.methods.lora_da import Calibration, LoRADA, Options, Solution, Solver
from lorainit.methods.parts import guidance
from lorainit.statistics import LayerStatistics
from matrices import best, normal, orthonormal, with_spectrum

SWITCHES = {  # the authors' names of what `Options` has under others
    "damping": "damping",
    "variance_beta": "variance_weight",
    "gamma": "gamma",
    "bias_alpha": "bias_weight",
    "output_damping_ratio": "output_damping",
    "normalize_variance_guidance": "match_norms",
    "balance_factors": "balance",
    "normalize_delta": "normalization",  # False is p = 0
    "delta_normalization_power": "normalization",
    "delta_normalization_reference": "reference",
}
WIDE = {"dense_up_to": 0, "double_up_to": 0}
sizes = pytest.mark.parametrize("size", [{}, WIDE], ids=["as-small-layers", "as-wide-layers"])
ALGORITHM1 = Options(damping=0.0, normalization=0.0, gamma=1.0)  # the paper's text, without the constants of its code


def solve(G: Tensor, Z: Tensor, y: Tensor, rank: int, options: Options, **known) -> Solution:
    solver = {name: known.pop(name) for name in WIDE if name in known}
    return lora_da.solve(Calibration(G, Z, y, **known), rank, options, Solver(**solver))


def official(hyper_parameters: dict) -> Options:
    known = {SWITCHES[k]: v for k, v in hyper_parameters.items() if k in SWITCHES}
    return Options(mode="official", **known | {"normalization": float(known["normalization"])})


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def moment(size: int, *, condition: float = 1e3, seed: int = 0) -> Tensor:
    """Return a second moment whose eigenvalues fall from 1 to 1/condition."""
    values = torch.logspace(0, -1, size, base=condition, dtype=torch.float64)
    frame = orthonormal(size, size, seed=seed)
    return (frame * values) @ frame.mT


def layer(out: int, n: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a gradient that inputs of second moment Z can give, Z, and y over two orders of magnitude."""
    Z, y = moment(n, seed=seed), torch.logspace(-1, -3, out, dtype=torch.float64)
    noise = normal(out, n, seed=seed + 1) @ torch.linalg.cholesky(Z).mT * y.sqrt()[:, None]
    return with_spectrum(out, n, [1.0, 0.5, 0.2, 0.1], seed=seed + 2) @ Z + 0.02 * noise, Z, y


def omega(G, Z, y, N, *, rho=1.0, beta=1.0, T=1.0) -> tuple[Tensor, Tensor]:
    """Return Ω and Δ̂ as the specification writes them, with an inverse."""
    inverse = torch.linalg.inv(Z + rho * Z.diagonal().mean() * eye(len(Z)))
    u = 1 / (T * (y + rho * y.mean()))
    delta = -inverse @ G.mT * u
    sigma = torch.linalg.matrix_norm(delta, 2)
    return beta * u.sum() / N / sigma**2 * inverse - delta @ delta.mT / sigma**2, delta / sigma


# --- the authors' values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden.cases("lora_da_layer"))
def test_matches_the_authors_from_given_statistics(case):
    tensors, rank, tolerances = case.tensors, case.options["r"], case.tolerances
    found = solve(
        tensors["weight_grad"],
        tensors["Z"],
        tensors["y"],
        rank,
        official(case.options),
        num_samples=case.options["population_size"],
        sequence_gradients=tensors.get("sequence_gradients"),
    )
    A, B = found.factors
    expected = tensors["lora_A"], tensors["lora_B"]
    assert golden.subspace(A, expected[0]) <= tolerances["subspace (published lora_A)"]
    assert golden.product(A, B, *expected) <= tolerances["product (published)"]
    assert golden.vectors(A, expected[0]) <= tolerances["vectors (published lora_A, lora_B)"]
    assert golden.vectors(B.mT, expected[1].mT) <= tolerances["vectors (published lora_A, lora_B)"]
    exact = tensors["ref64_lora_A"], tensors["ref64_lora_B"]
    assert golden.subspace(A, exact[0]) <= tolerances["subspace (ref64), float64 solver"]
    assert golden.product(A, B, *exact) <= tolerances["product (ref64), float64 solver"]
    eigenvalues = tensors["ref64_eigenvalues"]
    gap = (found.eigenvalues - eigenvalues[:rank]).abs().max() / eigenvalues.abs().max()
    assert float(gap) <= tolerances["eigenvalues, max abs / max |eigenvalue|"]
    if "sigma" in tensors:
        assert found.sigma == pytest.approx(float(tensors["sigma"]), rel=tolerances["sigma, relative"])
    if not case.options.get("balance_factors"):
        frame = case.options["gamma"] * A @ A.mT
        assert_close(
            frame,
            torch.eye(rank),
            rtol=0,
            atol=tolerances["row orthonormality of sqrt(gamma)*lora_A (not when balanced)"],
        )


SHARED_INPUTS = {"q_proj": "qkv_input", "k_proj": "qkv_input", "v_proj": "qkv_input"}
SHARED_INPUTS |= {"o_proj": "o_proj.input", "gate_proj": "gate_up_input", "up_proj": "gate_up_input"}
SHARED_INPUTS |= {"down_proj": "down_proj.input"}


@pytest.mark.parametrize("case", golden.cases("lora_da_llama/golden"))
def test_matches_the_authors_from_the_statistics_of_a_llama(case):
    tensors, rank, tolerances = case.tensors, case.options["r"], case.tolerances
    published = tolerances[
        "subspace, labels_mask" if case.name == "labels_mask" else "subspace (published lora_A) per module"
    ]
    # both cases have the same gradients, stored with the first
    gradients = golden.cases(case.file, prefix="attention_mask")[0].values[0].tensors
    modules = [name.removeprefix("lora_A.") for name in tensors if name.startswith("lora_A.")]
    assert len(modules) == 14
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        got = {kind: tensors[f"{kind}.{module}"] for kind in ("y", "lora_A", "lora_B", "sigma", "eigenvalues")}
        found = solve(
            gradients[f"weight_grad.{module}"],
            tensors[f"Z.{parent}.{SHARED_INPUTS[leaf]}"],
            got["y"],
            rank,
            official(case.options),
            num_samples=case.options["population_size"],
        )
        A, B = found.factors
        assert golden.subspace(A, got["lora_A"]) <= published
        assert golden.subspace(A, tensors[f"ref64_lora_A.{module}"]) <= tolerances["subspace (ref64) per module"]
        # the published σ is an under-estimate, and the published B carries it
        sigma = float(got["sigma"])
        assert -1e-5 <= 1 - sigma / found.sigma <= tolerances["sigma below exact spectral norm, relative, one-sided"]
        product = golden.product(A, found.sigma * B, got["lora_A"], sigma * got["lora_B"])
        assert product <= tolerances["product * sigma, relative Frobenius"]
        exact = got["eigenvalues"] * sigma**2
        gap = (found.eigenvalues * found.sigma**2 - exact[:rank]).abs().max() / exact.abs().max()
        assert float(gap) <= tolerances["eigenvalues * sigma^2, max abs / max"]


@pytest.mark.parametrize("case", golden.cases("lora_da_llama/golden"))
def test_matches_the_authors_from_model_and_data(case, shared):
    """Four padded batches in place of sixteen single sequences, and no weight ever has a gradient."""
    model = LlamaForCausalLM.from_pretrained(shared / "golden" / "lora_da_llama")
    config = LoraConfig(r=case.options["r"], target_modules=case.options["target_modules"])
    model = get_peft_model(model, config)
    stored = golden.cases(case.file, prefix="attention_mask")[0].values[0].tensors
    batch = {name: stored[name] for name in ("input_ids", "attention_mask", "labels")}
    data = [{name: rows[i : i + 4] for name, rows in batch.items()} for i in range(0, 16, 4)]
    method = LoRADA(mode="official", mask=case.options["fisher_token_mask"])
    lorainit.initialize(model, method, data=data, progress=False)
    names = {True: "subspace, labels_mask", False: "subspace (published lora_A) per module"}
    for site in lorainit.find_sites(model)[0]:
        A, B = site.factors()
        expected = [case.tensors[f"lora_{factor}.{site.name}"] for factor in "AB"]
        assert golden.subspace(A, expected[0]) <= case.tolerances[names[case.name == "labels_mask"]]
        # up to the published under-estimate of σ, one factor a module
        directions = (x / x.norm() for x in (B, expected[1]))
        product = golden.product(A, next(directions), expected[0], next(directions))
        assert product <= case.tolerances["product * sigma, relative Frobenius"]


# --- the formula ------------------------------------------------------------------------------------------------------


def test_variance_term_is_the_sum_of_the_diagonal_blocks_of_the_inverse_fisher():
    Z, y, T = moment(5), torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64), 7.0
    blocks = torch.linalg.inv(T * torch.kron(torch.diag(y), Z)).reshape(3, 5, 3, 5)
    expected = sum(blocks[i, :, i] for i in range(3))
    curved = guidance.curvature(Z, y, input_damping=0.0, output_damping=0.0, tokens_per_sample=T)
    nothing = torch.zeros(5, 3, dtype=torch.float64)
    c = float(curved.output_inverse.sum())
    found = guidance.Guidance(curved, (nothing, nothing), c)
    assert_close(found.dense(), expected, rtol=1e-11, atol=0)
    assert_close(found.apply(eye(5)), expected, rtol=1e-11, atol=0)


def test_full_output_factor_from_sequences_is_the_diagonal_of_its_damped_inverse():
    S, damping = normal(6, 9), 0.3
    curved = guidance.curvature(
        moment(4), torch.ones(9, dtype=torch.float64), input_damping=0.1, output_damping=damping, sequence_gradients=S
    )
    expected = torch.linalg.inv(S.mT @ S / 6 + damping * eye(9)).diagonal()
    assert_close(curved.output_inverse, expected, rtol=1e-11, atol=0)


def linear_gaussian(out: int, n: int, *, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return D, Cov x, the variances of the noise, and the gradient at D = 0 of y = Dx + e."""
    Sigma, Q = moment(n, condition=30), torch.linspace(0.5, 2.0, out, dtype=torch.float64)
    D = size * normal(out, n, seed=4)
    return D, Sigma, Q, -D @ Sigma / Q[:, None]


def test_linear_gaussian_displacement_is_exact_and_the_eigenvalues_give_the_risk():
    out, n, rank, N, draws = 5, 7, 2, 4000, 4000
    D, Sigma, Q, G = linear_gaussian(out, n, size=0.02)
    found = solve(G, Sigma, 1 / Q, rank, ALGORITHM1, num_samples=N)
    assert found.sigma == pytest.approx(float(torch.linalg.matrix_norm(D, 2)))
    A, B = found.factors
    assert_close(B @ A, D @ A.mT @ A, rtol=0, atol=1e-13)  # the projection of D: Δ = D
    risk = float(found.eigenvalues.sum()) + float(D.square().sum())
    # Monte Carlo: the fit on N samples, projected onto the subspace
    root = torch.linalg.inv(torch.linalg.cholesky(Sigma))
    errors = normal(draws * out, n, seed=9).reshape(draws, out, n) @ root * Q.sqrt()[:, None] / math.sqrt(N)
    simulated = ((D + errors) @ A.mT @ A - D).square().sum((1, 2)).mean()
    assert risk == pytest.approx(float(simulated), rel=0.02)
    # and no other subspace has less
    for seed in range(20):
        frame = orthonormal(n, rank, seed=seed)
        variance = float(Q.sum()) / N * float(torch.trace(frame.mT @ torch.linalg.solve(Sigma, frame)))
        assert risk <= variance + float((D - D @ frame @ frame.mT).square().sum()) + 1e-12


@given(out=st.integers(1, 12), n=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
def test_subspace_is_that_of_the_r_smallest_eigenvalues(out, n, data, seed):
    rank = data.draw(st.integers(1, min(out, n)))
    G, Z, y = normal(out, n, seed=seed), moment(n, seed=seed), torch.rand(out, dtype=torch.float64) + 0.1
    found = solve(G, Z, y, rank, Options(gamma=1.0), num_samples=50, tokens_per_sample=3.0)
    A, B = found.factors
    matrix, delta = omega(G, Z, y, 50, T=3.0)
    values = torch.linalg.eigvalsh(matrix)[:rank]
    assert_close(torch.trace(A @ matrix @ A.mT), values.sum(), rtol=0, atol=1e-9)
    assert_close(found.eigenvalues, values, rtol=0, atol=1e-9)
    assert_close(A @ A.mT, eye(rank), rtol=0, atol=1e-10)
    assert_close(B, delta.mT @ A.mT, rtol=0, atol=1e-9)
    assert bool((A.gather(1, A.abs().argmax(1)[:, None]) > 0).all())
    assert found.residual <= 1e-9


def test_without_variance_the_product_is_the_best_part_of_the_displacement():
    G, Z, y = layer(20, 30)
    A, B = lora_da.factors(G, Z, y, 4, num_samples=100, variance_weight=0.0, gamma=1.0)
    _, delta = omega(G, Z, y, 100)
    assert_close(B @ A, best(delta.mT, 4), rtol=0, atol=1e-9)


def test_without_curvature_it_is_the_gradients_singular_space():
    G = layer(20, 30)[0]
    A, B = lora_da.factors(G, eye(30), torch.ones(20).double(), 4, num_samples=100, variance_weight=0.0)
    assert golden.subspace(A, torch.linalg.svd(G)[2][:4]) <= 1e-9
    assert (
        golden.vectors((B @ A)[None].flatten(1), -best(G, 4)[None].flatten(1) / torch.linalg.matrix_norm(G, 2) / 1024)
        <= 1e-9
    )


def test_with_nothing_but_variance_it_is_the_inputs_principal_space():
    G, Z, y = layer(20, 30)
    A = lora_da.factors(G, Z, y, 4, num_samples=1, variance_weight=1e9).A
    assert golden.subspace(A, torch.linalg.eigh(Z)[1][:, -4:].mT) <= 1e-6


def test_more_training_samples_count_like_less_weight_on_the_variance():
    G, Z, y = layer(20, 30)
    few = lora_da.factors(G, Z, y, 4, num_samples=10, variance_weight=0.1)
    many = lora_da.factors(G, Z, y, 4, num_samples=100, variance_weight=1.0)
    assert_close(few, many, rtol=0, atol=1e-10)


def test_step_is_a_projection_of_the_displacement_of_size_one_over_gamma():
    G, Z, y = layer(20, 30)
    A, B = lora_da.factors(G, Z, y, 4, num_samples=100, gamma=1024.0)
    _, delta = omega(G, Z, y, 100)
    A0, B0 = 32 * A.mT, 32 * B.mT
    assert_close(A0.mT @ (delta - A0 @ B0), torch.zeros_like(B0), rtol=0, atol=1e-12)
    assert float((delta - A0 @ B0).square().sum()) == pytest.approx(float(delta.square().sum() - B0.square().sum()))
    assert_close(A @ A.mT, eye(4) / 1024, rtol=0, atol=1e-14)
    assert 0 < float(torch.linalg.matrix_norm(B @ A, 2)) <= (1 + 1e-12) / 1024


def test_rotated_inputs_rotate_the_start():
    G, Z, y = layer(20, 30)
    Q = orthonormal(30, 30, seed=7)
    plain = lora_da.factors(G, Z, y, 4, num_samples=100)
    turned = lora_da.factors(G @ Q.mT, Q @ Z @ Q.mT, y, 4, num_samples=100)
    assert golden.subspace(turned.A, plain.A @ Q.mT) <= 1e-9
    assert_close(turned.B @ turned.A, plain.B @ plain.A @ Q.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scale_of_the_loss_changes_nothing_but_in_official(scale):
    G, Z, y = layer(20, 30)
    consistent, published = (
        [solve(c * G, Z, c**2 * y, 4, Options(mode=mode), num_samples=100) for c in (1.0, scale)]
        for mode in ("consistent", "official")
    )
    assert_close(consistent[1].factors, consistent[0].factors, rtol=0, atol=1e-9)
    assert consistent[1].variance_to_bias == pytest.approx(consistent[0].variance_to_bias)
    # an absolute damping of y is everything or nothing, as the loss is scaled
    assert golden.subspace(published[1].factors.A, published[0].factors.A) > 1e-4


def test_longer_sequences_count_like_more_of_them():
    """Twice the tokens at the same Z and y: G and T double, the displacement stays, and its variance halves."""
    G, Z, y = layer(20, 30)
    long = solve(2 * G, Z, y, 4, Options(), num_samples=100, tokens_per_sample=16.0)
    many = solve(G, Z, y, 4, Options(), num_samples=200, tokens_per_sample=8.0)
    assert_close(long.factors, many.factors, rtol=0, atol=1e-12)
    assert (long.sigma, long.variance_to_bias) == pytest.approx((many.sigma, many.variance_to_bias))


@pytest.mark.parametrize("rho", [0.01, 1.0])
def test_damping_is_relative_to_the_mean_diagonal_and_of_y_on_its_own(rho):
    G, Z, y = layer(20, 30)
    found = solve(G, Z, y, 4, Options(damping=rho), num_samples=100)
    assert found.damping == pytest.approx(rho * float(Z.diagonal().mean()))
    assert found.output_damping == pytest.approx(rho * float(y.mean()))
    other = solve(G, Z, y, 4, Options(damping=rho, output_damping=0.3), num_samples=100)
    assert (other.damping, other.output_damping) == (found.damping, pytest.approx(0.3 * float(y.mean())))
    assert found.retries == 0


def test_zero_b_keeps_a_and_does_not_move_the_function():
    G, Z, y = layer(20, 30)
    plain, still = (lora_da.factors(G, Z, y, 4, num_samples=100, zero_b=zero) for zero in (False, True))
    assert torch.equal(still.A, plain.A)
    assert not bool(still.B.any())


def test_balanced_factors_share_the_singular_values_of_the_same_product():
    G, Z, y = layer(20, 30)
    plain, even = (lora_da.factors(G, Z, y, 4, num_samples=100, balance=balance) for balance in (False, True))
    assert_close(even.B @ even.A, plain.B @ plain.A, rtol=0, atol=1e-14)
    singular = torch.diag(torch.linalg.svdvals(plain.B @ plain.A)[:4])
    assert_close(even.A @ even.A.mT, singular, rtol=0, atol=1e-14)
    assert_close(even.B.mT @ even.B, singular, rtol=0, atol=1e-14)


# --- noise in the gradient --------------------------------------------------------------------------------------------


def test_debiasing_takes_out_what_sampling_puts_in():
    """With D = 0 the displacement is nothing but noise: E[ΔΔᵀ] = κ Z_λ⁻¹ Z Z_λ⁻¹."""
    out, n, samples, T, draws = 6, 4, 32, 3.0, 20000
    Z, y = moment(n, condition=10), torch.linspace(0.5, 2.0, out, dtype=torch.float64)
    curved = guidance.curvature(Z, y, input_damping=0.05, output_damping=0.1, tokens_per_sample=T)
    root = torch.linalg.cholesky(Z).mT
    gradients = normal(draws * out, n).reshape(draws, out, n) @ root * (T * y / samples).sqrt()[:, None]
    deltas = -torch.linalg.solve(Z + 0.05 * eye(n), gradients.mT) * curved.output_inverse
    nothing = torch.zeros(n, out, dtype=torch.float64)
    expected = guidance.Guidance(curved, (nothing, nothing), 0.0, curved.noise(samples)).dense()
    assert_close((deltas @ deltas.mT).mean(0), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))
    # undamped it is the variance term with n for N
    bare = guidance.curvature(Z, y, input_damping=0.0, output_damping=0.0, tokens_per_sample=T)
    bare_noise = guidance.Guidance(bare, (nothing, nothing), 0.0, bare.noise(samples)).dense()
    variance = guidance.Guidance(bare, (nothing, nothing), float(bare.output_inverse.sum()) / samples).dense()
    assert_close(bare_noise, variance, rtol=1e-10, atol=0)


def test_debias_and_cross_fit_enter_omega_as_written():
    G, Z, y = layer(20, 30)
    noise = 0.3 * normal(20, 30, seed=8) @ Z
    halves, rho = (G + noise, G - noise), 0.05
    inverse = torch.linalg.inv(Z + rho * Z.diagonal().mean() * eye(30))
    u = 1 / (2.0 * (y + rho * y.mean()))
    delta, first, second = (-inverse @ g.mT * u for g in (G, *halves))
    sigma2 = torch.linalg.matrix_norm(delta, 2) ** 2
    variance = u.sum() / 100 * inverse
    kappa = (u.square() * 2.0 * y).sum() / 64
    expected = {
        "debias": variance - delta @ delta.mT + kappa * inverse @ Z @ inverse,
        "cross_fit": variance - (first @ second.mT + second @ first.mT) / 2,
    }
    for option, matrix in expected.items():
        found = solve(
            G,
            Z,
            y,
            4,
            Options(damping=rho, gamma=1.0, **{option: True}),
            num_samples=100,
            tokens_per_sample=2.0,
            calibration_samples=64,
            halves=halves,
        )
        values, vectors = torch.linalg.eigh(matrix / sigma2)
        assert_close(found.eigenvalues, values[:4], rtol=0, atol=1e-10)
        assert golden.subspace(found.factors.A, vectors[:, :4].mT) <= 1e-7
        assert_close(found.factors.B, delta.mT @ found.factors.A.mT / sigma2.sqrt(), rtol=0, atol=1e-10)


def test_reported_ratios_are_traces_over_the_subspace():
    G, Z, y = layer(20, 30)
    found = solve(G, Z, y, 4, Options(gamma=1.0), num_samples=100, calibration_samples=64)
    A, B = found.factors
    matrix, delta = omega(G, Z, y, 100)
    kept = float(B.square().sum())
    variance = float(torch.trace(A @ (matrix + delta @ delta.mT) @ A.mT))
    assert found.variance_to_bias == pytest.approx(variance / kept)
    assert found.break_even == pytest.approx(100 * variance / kept)
    inverse = torch.linalg.inv(Z + found.damping * eye(30))
    kappa = float((y / (y + found.output_damping) ** 2).sum()) / 64 / found.sigma**2
    expected = kappa * float(torch.trace(A @ inverse @ Z @ inverse @ A.mT)) / kept
    assert found.noise_to_signal == pytest.approx(expected)
    assert solve(G, Z, y, 4, Options(), num_samples=100).noise_to_signal is None


def sampled(n: int, size: float, seed: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return G, Z, y and the gradients of the halves from n samples of y = Dx + e, and D Cov(x)^½."""
    root = torch.linalg.cholesky(moment(48))
    D = with_spectrum(32, 48, [size * value for value in (3.0, 2.0, 2.0, 1.0)], seed=seed)
    x = normal(n, 48, seed=seed + 1) @ root.mT
    g = -(x @ D.mT + normal(n, 32, seed=seed + 2))
    halves = (g[::2].mT @ x[::2] / (n // 2), g[1::2].mT @ x[1::2] / (n // 2))
    return g.mT @ x / n, x.mT @ x / n, g.square().mean(0), halves, D @ root


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_auto_damping_keeps_most_of_the_true_decrease_of_the_loss(size):
    def missed(A: Tensor, target: Tensor) -> float:
        seen = torch.linalg.qr((A @ torch.linalg.cholesky(moment(48))).mT).Q
        return float((target - target @ seen @ seen.mT).square().sum() / target.square().sum())

    risks = []
    for seed in range(5):
        G, Z, y, halves, target = sampled(1024, size, 10 * seed)
        options = [{"damping": rho, "output_damping": 0.1} for rho in (0.01, 0.1, 1.0, 10.0)] + [{"damping": "auto"}]
        starts = [lora_da.factors(G, Z, y, 4, num_samples=10**5, halves=halves, **chosen) for chosen in options]
        risks.append([missed(start.A, target) for start in starts])
    *fixed, auto = torch.tensor(risks).mean(0).tolist()
    assert 1 - auto >= 0.75 * (1 - min(fixed))
    assert auto < 0.8 * max(fixed)  # the worst of them would be a loss


# --- wide layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(Options(), id="bias"),
        pytest.param(Options(variance_weight=0.0), id="no-variance"),
        pytest.param(Options(variance_weight=30.0), id="both"),
        pytest.param(Options(variance_weight=1e6), id="variance"),
        pytest.param(Options(damping=1e-3, variance_weight=30.0), id="little-damping"),
        pytest.param(Options(damping=0.01, debias=True), id="debias"),
        pytest.param(Options(cross_fit=True), id="cross-fit"),
        pytest.param(Options(mode="official"), id="official"),
        pytest.param(Options(match_norms=True), id="match-norms"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_search_finds_what_a_dense_decomposition_finds(options, dtype, monkeypatch):
    G, Z, y = layer(90, 240)
    noise = 0.005 * normal(90, 240, seed=8) @ Z
    extra = {"num_samples": 100, "calibration_samples": 64, "halves": (G + noise, G - noise)}
    dense = solve(G, Z, y, 4, options, **extra)
    monkeypatch.setattr(guidance, "dense_eigenpairs", None)  # no way back
    wide = solve(*(x.to(dtype) for x in (G, Z, y)), 4, options, **WIDE, **extra)
    tolerance = 1e-6 if dtype == torch.float64 else 5e-3
    assert golden.subspace(wide.factors.A, dense.factors.A) <= tolerance
    assert golden.product(*wide.factors, *dense.factors) <= tolerance
    assert wide.sigma == pytest.approx(dense.sigma, rel=tolerance)
    assert wide.factors.A.dtype == dtype
    # no residual is smaller than the rounding errors of products with Ω, whose norm is at most (v + κ)/λ_z
    posed = lora_da.pose(Calibration(G, Z, y, **extra), 4, options).guidance
    largest = (posed.variance + posed.noise) / posed.curvature.cholesky.damping
    rounding = 10 * torch.finfo(dtype).eps * largest / float(dense.eigenvalues.abs().max())
    assert wide.residual <= max(1e-9 if dtype == torch.float64 else 1e-3, rounding)


def test_search_that_does_not_converge_gives_way_to_a_dense_decomposition(monkeypatch):
    G, Z, y = layer(90, 240)
    stuck = guidance.smallest_eigenpairs
    monkeypatch.setattr(guidance, "smallest_eigenpairs", lambda *a, **k: stuck(*a, **k | {"iterations": 0}))
    options = Options(variance_weight=30.0)
    found, expected = (solve(G, Z, y, 4, options, num_samples=100, **size) for size in (WIDE, {}))
    assert_close(found.factors, expected.factors, rtol=0, atol=1e-8)


def test_result_does_not_depend_on_the_generator():
    G, Z, y = layer(90, 240)
    runs = [
        lora_da.factors(G, Z, y, 4, num_samples=100, **WIDE, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    ]
    assert_close(*runs, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("out", "n", "rank"), [(1, 40, 1), (40, 1, 1), (3, 40, 3), (40, 3, 3), (8, 8, 8)], ids=str)
@sizes
def test_small_shapes_and_full_ranks_have_a_start(out, n, rank, size):
    G, Z, y = normal(out, n), moment(n), torch.ones(out, dtype=torch.float64)
    A, B = lora_da.factors(G, Z, y, rank, num_samples=100, **size, gamma=1.0)
    assert (A.shape, B.shape) == ((rank, n), (out, rank))
    assert_close(A @ A.mT, eye(rank), rtol=0, atol=1e-9)


# --- statistics that are poor -----------------------------------------------------------------------------------------


def few_tokens(n: int, tokens: int) -> Tensor:
    x = normal(tokens, n)
    return x.mT @ x / tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@sizes
def test_singular_moment_is_damped_as_much_as_it_takes_and_says_so(dtype, size):
    G, Z = normal(30, 200) @ few_tokens(200, 60), few_tokens(200, 60)
    found = solve(
        G.to(dtype),
        Z.to(dtype),
        torch.ones(30, dtype=dtype),
        4,
        Options(damping=0.0, output_damping=0.1),
        num_samples=100,
        **size,
    )
    assert found.retries > 0
    assert 0 < found.damping < 1e-2
    A = 32 * found.factors.A
    assert_close(A @ A.mT, torch.eye(4, dtype=dtype), rtol=0, atol=1e-4)


def test_little_damping_of_a_wide_singular_moment_is_solved_in_float64():
    """The published λ = 1e-6 drowns in float32's rounding: solutions would be 10⁷ times too large, and finite."""
    Z, G, y = few_tokens(512, 300).float(), normal(64, 512).float(), torch.ones(64)
    found = solve(G, Z, y, 4, Options(mode="official"), num_samples=10**5, **WIDE)
    exact = -torch.linalg.solve(Z.double() + 1e-6 * eye(512), G.mT.double()) / (1 + 1e-6)
    assert found.sigma == pytest.approx(float(torch.linalg.matrix_norm(exact, 2)), rel=1e-6)
    assert (found.damping, found.retries) == (1e-6, 0)


def test_dead_output_units_need_damping():
    G, Z, y = layer(20, 30)
    y, G = y * (torch.arange(20) > 0), G * (torch.arange(20) > 0)[:, None]
    assert bool(lora_da.factors(G, Z, y, 4, num_samples=100).A.isfinite().all())
    with pytest.raises(ValueError, match="an output unit has no gradient .* raise output_damping"):
        lora_da.factors(G, Z, y, 4, num_samples=100, output_damping=0.0)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
@sizes
def test_tiny_and_huge_gradients_have_the_same_start_in_float32(scale, size):
    G, Z, y = (x.float() for x in layer(40, 120))
    # y is a square, and as a float32 it would be zero here: kept in float64
    expected = lora_da.factors(G, Z, y, 4, num_samples=100)
    found = lora_da.factors(G * scale, Z, y, 4, num_samples=100, **size, variance_weight=0.0)
    plain = lora_da.factors(G, Z, y, 4, num_samples=100, variance_weight=0.0)
    assert golden.subspace(found.A, plain.A) <= 1e-3
    assert bool(expected.A.isfinite().all())


NAMES = ("weight gradient", "second moment of the inputs", "second moment of the output gradients")


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (math.nan, NonFiniteError, "holds NaN"),
        (math.inf, NonFiniteError, "holds NaN or inf"),
        (0.0, ValueError, "is zero"),
    ],
    ids=["nan", "inf", "zero"],
)
def test_statistics_that_give_no_start_are_refused(index, value, error, message):
    statistics = list(layer(20, 30))
    statistics[index] = statistics[index].clone().fill_(0.0)
    statistics[index].view(-1)[3] = value
    with pytest.raises(error, match=f"the {NAMES[index]} {message}"):
        lora_da.factors(*statistics, 4, num_samples=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 21}, "rank 21 is not between 1 and"),
        ({"num_samples": 0}, "num_samples and tokens_per_sample must be positive"),
        ({"tokens_per_sample": 0.0}, "num_samples and tokens_per_sample must be positive"),
        ({"cross_fit": True}, "need halves"),
        ({"damping": "auto"}, "need halves"),
        ({"debias": True}, "needs calibration_samples"),
        ({"mode": "paper"}, r"mode='paper' is not one of \['consistent', 'official'\]"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lora_da.factors(*layer(20, 30), **{"rank": 4, "num_samples": 100} | arguments)


def test_moment_that_is_none_is_refused():
    G, Z, y = layer(20, 30)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        lora_da.factors(G, Z - 1e4 * (eye(30) - torch.outer(Z[0], Z[0])).tril(-1), y, 4, num_samples=100)


# --- the method -------------------------------------------------------------------------------------------------------


def sums(G: Tensor, Z: Tensor, y: Tensor, *, n: int = 10, T: int = 6, odd: Tensor | None = None) -> LayerStatistics:
    """Return the sums over n sequences of T tokens that have these means."""
    return LayerStatistics(
        sequences=n,
        tokens=n * T,
        weight_gradient=n * G,
        input_second_moment=n * T * Z,
        output_gradient_squares=n * T * y,
        odd_weight_gradient=odd,
    )


@pytest.mark.parametrize(
    "options", [{}, {"mode": "official"}, {"damping": 1.0, "debias": True}, {"zero_b": True}], ids=str
)
def test_method_turns_sums_into_means(site, generator, options):
    G, Z, y = layer(20, 30)
    method = LoRADA(training_samples=500, **options)
    start = method.start(site(normal(20, 30), 4), generator, sums(G, Z, y))
    expected = lora_da.factors(G, Z, y, 4, num_samples=500, tokens_per_sample=6.0, calibration_samples=10, **options)
    assert_close(start, expected, rtol=0, atol=1e-10)
    found = method.solve(site(normal(20, 30), 4), generator, sums(G, Z, y))
    assert found.noise_to_signal is not None


@pytest.mark.parametrize("options", [{"cross_fit": True}, {"damping": "auto"}], ids=str)
@pytest.mark.parametrize("n", [10, 11])
def test_method_makes_halves_from_every_second_sequence(site, generator, options, n):
    G, Z, y = layer(20, 30)
    noise = 0.1 * normal(20, 30, seed=8) @ Z
    odd = (n // 2) * (G + noise)
    start = LoRADA(**options).start(site(normal(20, 30), 4), generator, sums(G, Z, y, n=n, odd=odd))
    halves = (odd / (n // 2), (n * G - odd) / (n - n // 2))
    expected = lora_da.factors(G, Z, y, 4, num_samples=100_000, tokens_per_sample=6.0, halves=halves, **options)
    assert_close(start, expected, rtol=0, atol=1e-10)


def test_method_asks_for_what_it_needs():
    plain = {"input_second_moment", "output_gradient_squares", "weight_gradient"}
    assert LoRADA.streams == LoRADA().request.streams == plain
    assert (
        LoRADA(cross_fit=True).request.streams
        == LoRADA(damping="auto").request.streams
        == plain | {"odd_weight_gradient"}
    )
    assert (LoRADA().request.loss, LoRADA().request.mask) == ("sum", "attention")
    published = LoRADA(mode="official", mask="labels").request
    assert (published.loss, published.mask) == ("sequence_mean", "labels")


def without(statistics: LayerStatistics, **changes) -> LayerStatistics:
    return dataclasses.replace(statistics, **changes)


FULL = sums(*layer(8, 6))


@pytest.mark.parametrize(
    ("options", "statistics", "error", "message"),
    [
        pytest.param({}, without(FULL, weight_gradient=None), UnsupportedLayerError, "lack", id="missing"),
        pytest.param({"cross_fit": True}, FULL, UnsupportedLayerError, r"lack \['odd_weight_gradient'\]", id="no-half"),
        pytest.param({}, without(FULL, tokens=0), UnsupportedLayerError, "no calibration data", id="no-tokens"),
        pytest.param({}, without(FULL, weight_gradient=normal(8, 6) * math.nan), NonFiniteError, "NaN", id="nan"),
        pytest.param({}, without(FULL, weight_gradient=normal(8, 6) * 0), UnsupportedLayerError, "is zero", id="zero"),
        pytest.param(
            {"cross_fit": True},
            without(FULL, sequences=1, odd_weight_gradient=normal(8, 6)),
            UnsupportedLayerError,
            "at least two sequences",
            id="one-sequence",
        ),
    ],
)
def test_method_names_the_layer_that_it_cannot_start(site, generator, options, statistics, error, message):
    with pytest.raises(error, match=f"layer 'block.proj': .*{message}"):
        LoRADA(**options).start(site(normal(8, 6), 2), generator, statistics)


def test_rank_above_min_is_refused_by_name(site, generator):
    with pytest.raises(UnsupportedLayerError, match=r"'block.proj': rank 7 exceeds min\(in, out\) = 6"):
        LoRADA().start(site(normal(8, 6), 7), generator, FULL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "algorithm1"}, "mode='algorithm1' is not one of"),
        ({"mask": "all"}, "mask='all' is not one of"),
        ({"damping": -0.1}, "damping must be ≥ 0"),
        ({"damping": "some"}, "neither a number nor 'auto'"),
        ({"output_damping": -1.0}, "output_damping must be ≥ 0"),
        ({"variance_weight": math.nan}, "variance_weight must be ≥ 0"),
        ({"gamma": 0.0}, "gamma and reference must be positive"),
        ({"reference": -1.0}, "gamma and reference must be positive"),
        ({"mode": "official", "damping": "auto"}, "need the units of mode='consistent'"),
        ({"mode": "official", "cross_fit": True}, "need the units of mode='consistent'"),
        ({"mode": "official", "debias": True}, "need the units of mode='consistent'"),
        ({"zero_b": True, "balance": True}, "nothing to balance"),
        ({"samples": 0}, "samples and training_samples must be ≥ 1"),
        ({"training_samples": 0}, "samples and training_samples must be ≥ 1"),
    ],
    ids=str,
)
def test_options_are_checked_when_the_method_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        LoRADA(**options)
