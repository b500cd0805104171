"""Constraints of CNTLoRA that compare the data with others: the start that the moments give, or a clear error."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import cases
from cases import CONV, LLAMA
from lorainit import CNTLoRA, LoraInitError, RankRule, find_sites
from lorainit.methods import cntlora

F64 = torch.float64


def batches(case, seed):
    with cases.seeded(seed):
        example = case.example()
        return [{k: v.to(F64) if v.is_floating_point() else v for k, v in example.items()} for _ in range(2)]


def inputs(model, data):
    """Each layer's inputs as rows, from hooks of this test's own; convolutions are left out."""
    seen = {site.name: [] for site in find_sites(model)[0] if site.kind != "conv"}
    handles = [
        site.base_layer.register_forward_pre_hook(
            lambda _, args, name=site.name: seen[name].append(args[0].flatten(0, -2))
        )
        for site in find_sites(model)[0]
        if site.name in seen
    ]
    with model.disable_adapter(), torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("case", [LLAMA, CONV], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "method",
    [CNTLoRA("F1p"), CNTLoRA("F1p", moment="centred", map="coral"), CNTLoRA("F5"), CNTLoRA("F2", paired=True)],
    ids=str,
)
def test_the_step_is_the_one_of_the_two_sets_of_inputs(case, method):
    model = case.adapted(F64, r=2)
    data, proxies = batches(case, 5), batches(case, 6)
    x, y = inputs(model, data), inputs(model, proxies)
    cases.start(model, method, data=data, proxy_data=proxies)
    for site in find_sites(model)[0]:
        if site.name not in x:
            continue
        xs, ys = x[site.name], y[site.name]
        options = {"constraint": method.constraint, "moment": method.moment, "map": method.map}
        options |= {"input_mean": xs.mean(0), "proxy_mean": ys.mean(0), "proxy_second_moment": ys.mT @ ys / len(ys)}
        if method.paired:
            options["cross_second_moment"] = ys.mT @ xs / len(ys)
        expected = cntlora.factors(
            site.weight(), xs.mT @ xs / len(xs), 2, site.scaling, drift=method.drift, exact=True, **options
        )
        A, B = site.factors()
        product = expected.B @ expected.A
        assert_close(B @ A, product, rtol=0, atol=1e-4 * float(product.abs().max()))  # sums are in float32


def test_data_paired_with_themselves_ask_for_no_step():
    model = LLAMA.adapted(F64, r=2)
    data = batches(LLAMA, 5)
    report = cases.start(model, CNTLoRA("F2", paired=True, damping=0.0), data=data, proxy_data=data)
    assert all(row.relative_size < 1e-5 for row in report.layers)


def test_ranks_are_shared_by_what_the_comparison_says():
    model = LLAMA.adapted(r=2)
    report = cases.start(
        model, CNTLoRA("F1p"), data=LLAMA.batches(), proxy_data=[LLAMA.batch()], ranks=RankRule("budget", rho=3.0)
    )
    assert sum(row.rank for row in report.layers) == 2 * len(report.layers)


SHORT = [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]


@pytest.mark.parametrize(
    ("method", "proxies", "message"),
    [
        pytest.param(CNTLoRA("F1p"), None, "constraint='F1p'.*pass proxy_data", id="missing"),
        pytest.param(CNTLoRA("F2", paired=True), None, "paired=True.*pass proxy_data", id="missing pairs"),
        pytest.param(CNTLoRA("F1"), [LLAMA.batch()], "leave proxy_data out", id="not wanted"),
        pytest.param("eva", [LLAMA.batch()], "leave proxy_data out", id="another method"),
        pytest.param(CNTLoRA("F1p"), iter([LLAMA.batch()]), "not an iterator", id="iterator"),
        pytest.param(CNTLoRA("F2", paired=True), [LLAMA.batch()] * 2, "one of them has more batches", id="more"),
        pytest.param(CNTLoRA("F2", paired=True), SHORT, r"18 positions .* 3 in its pair", id="other shape"),
    ],
)
def test_wrong_second_sets_are_refused(method, proxies, message):
    model = LLAMA.adapted(r=2)
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=message):
        cases.start(model, method, data=[LLAMA.batch()], proxy_data=proxies)
    snapshot.assert_unchanged(model)
