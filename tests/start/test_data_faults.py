"""Data that are not what a method needs: one clear error, or a remedy in the report; never a model half started."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cases
import lorainit
from cases import CONV, DATA_DRIVEN, LLAMA, Case, Net
from lorainit import LoraInitError, NonFiniteError

each_method = pytest.mark.parametrize("method", DATA_DRIVEN)
# methods whose start has a component for every direction, because it is damped or trained: nothing to remedy
FULL = ("corda", "ag-lora", "cntlora", "lora-da", "hrp", "abm")
NEEDS = {info.name: info.needs for info in lorainit.available()}


class Cliff(nn.Module):
    """Adds √0: nothing to the value, NaN to the gradient."""

    def forward(self, x):
        return x + (0 * x).sqrt()


CLIFF = Case(
    "cliff",
    lambda: Net(flat=nn.Flatten(), first=nn.Linear(192, 8), cliff=Cliff(), second=nn.Linear(8, cases.CLASSES)),
    ("first", "second"),
    cases._pixels,
    cases._class_labels,
)


def refused(case, method, data, error, message, **options):
    model = case.adapted(r=2)
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(error, match=message):
        cases.start(model, method, data=data, **options)
    snapshot.assert_unchanged(model)


@each_method
@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param([], "not a single batch", id="no batch"),
        pytest.param([{"wrong": torch.zeros(1, 2)}], r"refuses a calibration batch \(wrong\[1, 2\]\)", id="refused"),
        pytest.param([{"input_ids": None}], "holds no tensor", id="no tensor"),
        pytest.param({"input_ids": torch.ones(4, dtype=torch.long)}, r"\(input_ids\[4\]\) is one row", id="one row"),
        pytest.param(
            [{"input_ids": torch.tensor([[1, cases.VOCAB]])}], "refuses a calibration batch", id="no such token"
        ),
    ],
)
def test_batches_that_cannot_be_run(method, data, message):
    refused(LLAMA, method, data, LoraInitError, message)


@each_method
@pytest.mark.parametrize("number", [-1, 0])
def test_fewer_batches_than_one_are_refused(method, number):
    refused(
        LLAMA,
        method,
        LLAMA.batches(),
        LoraInitError,
        f"max_batches must be ≥ 1 or None, got {number}",
        max_batches=number,
    )


@each_method
def test_a_number_that_is_none_is_located(method):
    good, bad = CONV.batches()[0], CONV.batches()[0]
    bad["pixel_values"][0, 0, 0, 0] = torch.nan
    where = "batch 1" if "training" not in NEEDS[method] else r"step \d"  # a training may take them in its own order
    refused(CONV, method, [good, bad], NonFiniteError, where)


@pytest.mark.parametrize("method", [name for name in DATA_DRIVEN if NEEDS[name] == ("forward", "backward")])
def test_a_gradient_that_is_no_number_is_located_though_the_loss_is_fine(method):
    refused(CLIFF, method, CLIFF.batches(), NonFiniteError, "layer 'first', batch 0: .*gradient")


@pytest.mark.parametrize("method", [name for name in DATA_DRIVEN if "training" not in NEEDS[name]])
def test_a_layer_beyond_the_budget_is_named(method):
    refused(LLAMA, method, LLAMA.batches(), LoraInitError, "layer 'model.layers.0.*' alone needs", memory_budget=40)


@each_method
@pytest.mark.parametrize(
    "tokens", [pytest.param([[3]], id="one token"), pytest.param([[3, 3, 3]], id="one over again")]
)
def test_fewer_directions_than_the_rank_give_a_remedy_in_the_report_or_an_error(method, tokens):
    """A rank-1 moment or gradient: every start is finite and trains, or the layer is named and nothing has changed."""
    model = LLAMA.adapted(r=4)
    snapshot = cases.Snapshot.of(model)
    ids = torch.tensor(tokens * 2)
    ids = torch.cat((ids, ids), dim=1)
    data = [{"input_ids": ids, "labels": ids.clone()}]
    try:
        report = cases.start(model, method, data=data)
    except LoraInitError as error:
        assert "layer 'model.layers." in str(error)
        snapshot.assert_unchanged(model)
        return
    for site in lorainit.find_sites(model)[0]:
        A, B = site.factors()
        assert A.isfinite().all() and B.isfinite().all()
        assert bool(A.any(dim=1).all() or B.any(dim=0).all())  # no component is dead
    assert any(row.warnings for row in report.layers) or method in FULL
