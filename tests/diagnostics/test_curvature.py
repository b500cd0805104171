from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import lorainit
from cases import BERT, CONV, GPT2, LLAMA, Snapshot, start, train
from lorainit.adapter import offset
from lorainit.diagnostics.curvature import AdapterLoss, top_eigenvalue


def symmetric(values):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T


@pytest.mark.parametrize(
    "values", [[5.0, 3.0, 1.0, 0.0], [-9.0, 2.0, 1.0, 0.5], [4.0, 4.0, 4.0, 1.0], [0.0] * 4, [-3.0, -2.0, -1.0, -0.5]]
)
def test_lanczos_finds_the_algebraically_largest_eigenvalue(values) -> None:
    H = symmetric(values)
    found = top_eigenvalue(lambda v: H @ v, torch.ones(4, dtype=torch.float64), tolerance=1e-12)
    assert found.value == pytest.approx(max(values), abs=1e-9)
    assert found.residual <= 1e-6


def test_the_residual_bounds_the_error_of_an_unfinished_run() -> None:
    values = torch.linspace(0, 1, 200, dtype=torch.float64).tolist()
    H = symmetric(values)
    found = top_eigenvalue(lambda v: H @ v, torch.ones(200, dtype=torch.float64), iterations=5)
    assert 0 < float((torch.tensor(values) - found.value).abs().min()) <= found.residual


def dense_hessian(model, sites, batch):
    names = {id(p): n for n, p in model.named_parameters()}
    parameters = [offset.trained_factor(m) for s in sites for m in (s.lora_A, s.lora_B)]
    sizes = [p.numel() for p in parameters]

    def loss(vector):
        parts = [v.view_as(p) for v, p in zip(vector.split(sizes), parameters, strict=True)]
        replaced = {names[id(p)]: v for p, v in zip(parameters, parts, strict=True)}
        return functional_call(model, replaced, kwargs=batch).loss

    return torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in parameters]))


@pytest.mark.parametrize("method", ["kaiming", "init-ab"])
def test_products_and_top_eigenvalue_are_those_of_the_dense_hessian(method) -> None:
    # plain factors: functional_call cannot replace the parameter behind an offset factor's property
    model = CONV.adapted(torch.float64, target_modules=["pointwise", "head"], r=2)
    start(model, method)
    batch = CONV.batches(torch.float64)[0]
    sites = lorainit.find_sites(model)[0]
    H = dense_hessian(model, sites, batch)
    loss = AdapterLoss(model, sites, [batch, batch])  # twice the same batch: the same mean
    vector = torch.randn(H.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sizes = [p.numel() for p in loss.parameters]
    parts = [v.view_as(p) for v, p in zip(vector.split(sizes), loss.parameters, strict=True)]
    found = torch.cat([h.flatten() for h in loss.hessian_product(parts)])
    torch.testing.assert_close(found, H @ vector, rtol=1e-4, atol=1e-6)  # the loss itself is float32 there
    expected = float(torch.linalg.eigvalsh(H)[-1])
    assert loss.sharpness(iterations=30).value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("case", [LLAMA, GPT2, BERT], ids=lambda case: case.name)
def test_re_expressing_a_start_changes_the_curvature_as_the_scaling_equivalence_says(case) -> None:
    values = {}
    for match in (False, True):
        model = case.adapted(torch.float64, target_modules=[case.targets[0]])
        report = start(model, "pissa", match_lr=match)
        sites = lorainit.find_sites(model)[0][:1]
        values[match] = AdapterLoss(model, sites, case.batches(torch.float64)).sharpness(iterations=40).value
    assert values[True] == pytest.approx(values[False] * report.layers[0].rate_ratio ** 2, rel=0.02)


def test_the_model_is_left_as_it_was() -> None:
    model = LLAMA.adapted().train()
    start(model, "pissa")
    before = Snapshot.of(model)
    AdapterLoss(model, lorainit.find_sites(model)[0], LLAMA.batches()).sharpness(iterations=2)
    before.assert_unchanged(model)


def test_the_curvature_is_that_of_the_adapter_alone_whichever_is_active() -> None:
    model = LLAMA.adapted()
    start(model, "kaiming")
    train(model, LLAMA.batches())
    sites = lorainit.find_sites(model)[0]
    alone = AdapterLoss(model, sites, LLAMA.batches()).sharpness().value
    model.add_adapter("second", LLAMA.lora_config())
    lorainit.initialize(model, "init-ab", adapter_name="second", progress=False)
    for active in (["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        with torch.no_grad():
            assert AdapterLoss(model, sites, LLAMA.batches()).sharpness().value == pytest.approx(alone, rel=1e-6)
        assert model.active_adapters == active
