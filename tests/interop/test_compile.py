"""torch.compile before and after the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cases
import lorainit
from cases import LLAMA, Case, Net


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_started_model_compiles_as_one_graph_and_computes_and_trains_the_same():
    eager, model = LLAMA.adapted(), LLAMA.adapted()
    for each in (eager, model):
        cases.start(each, "pissa")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    losses = []
    for each in (eager, compiled):
        each.train()
        loss = each(**LLAMA.batches()[0]).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for one, two in zip(lorainit.find_sites(eager)[0], lorainit.find_sites(model)[0], strict=True):
        for factor in ("lora_A", "lora_B"):
            a, b = (lorainit.offset.trained_factor(getattr(site, factor)).grad for site in (one, two))
            torch.testing.assert_close(a, b)


SMALL = Case(
    "small",
    lambda: Net(flat=nn.Flatten(), first=nn.Linear(192, 8), tanh=nn.Tanh(), head=nn.Linear(8, cases.CLASSES)),
    ("first", "head"),
    cases._pixels,
    cases._class_labels,
)


@pytest.mark.parametrize("method", [pytest.param("pissa", marks=pytest.mark.slow), "corda"])
def test_a_compiled_model_that_has_run_is_started_and_then_runs_as_started(method):
    model = SMALL.adapted()
    compiled = torch.compile(model, backend="eager")
    before = cases.logits(compiled, SMALL.batch())
    cases.start(compiled, method, data=SMALL.batches())
    assert all(lorainit.offset.is_attached(site.lora_A) for site in lorainit.find_sites(model)[0])
    assert torch.equal(cases.logits(compiled, SMALL.batch()), before)
    cases.train(model, SMALL.batches(), steps=1)
    trained = cases.logits(model, SMALL.batch())
    torch.testing.assert_close(cases.logits(compiled, SMALL.batch()), trained)
    assert not torch.equal(trained, before)
