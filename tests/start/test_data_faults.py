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


# --- a tower that the data do not reach ---------------------------------------------------------------------------


class Beside(nn.Identity):
    """Passes its input on; the layer that it holds is not part of that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 8)


class Towers(Net):
    """Two layers in a row, and one beside them that never runs, or whose output nothing depends on."""

    def __init__(self, *, runs: bool) -> None:
        ends = {"first": nn.Linear(192, 8), "tanh": nn.Tanh(), "last": nn.Linear(8, cases.CLASSES)}
        super().__init__(flat=nn.Flatten(), **ends, tower=Beside())
        self.runs = runs

    def forward(self, pixel_values, labels=None):
        if self.runs:
            self.tower.layer(pixel_values.flatten(1))
        return super().forward(pixel_values, labels)


def towers(*, runs: bool) -> Case:
    targets = ("first", "layer", "last")
    return Case("towers", lambda: Towers(runs=runs), targets, cases._pixels, cases._class_labels, {"r": 2})


TRAINED = ("hrp", "abm")  # they train what is there, and start nothing from sums
PROXIES = {"pairs": lorainit.CNTLoRA(constraint="F2", paired=True), "proxies": lorainit.CNTLoRA(constraint="F1p")}


@pytest.mark.parametrize("method", [*(name for name in DATA_DRIVEN if name not in TRAINED), *PROXIES])
def test_a_tower_that_the_data_do_not_reach_is_left_alone_where_the_caller_says_so(method):
    case = towers(runs=False)
    method, data = PROXIES.get(method, method), case.batches()
    options = {"proxy_data": case.batches()} if not isinstance(method, str) else {}
    refused(case, method, data, LoraInitError, r"layer 'tower\.layer' saw no token of the calibration data", **options)
    model = case.adapted()
    before = {k: v.clone() for k, v in model.state_dict().items() if "tower.layer.lora" in k}
    with pytest.warns(UserWarning, match=r"layer 'tower\.layer' as it was: .* saw no token"):
        report = cases.start(model, method, data=data, on_unsupported="default", **options)
    assert [row.name for row in report.layers if row.kind == "default"] == ["tower.layer"]
    cases.assert_same_tensors({k: v for k, v in model.state_dict().items() if k in before}, before)


@pytest.mark.parametrize("method", TRAINED)
def test_a_short_training_leaves_such_a_tower_where_vanilla_has_it(method):
    case = towers(runs=False)
    model = case.adapted()
    report = cases.start(model, method, data=case.batches(), on_unsupported="default")
    (row,) = [row for row in report.layers if row.name == "tower.layer"]
    assert row.base == "none" and row.relative_size == 0


@pytest.mark.parametrize("options", [{"ranks": "budget"}, {"cache": True}, {"memory_budget": "1MB"}])
def test_such_a_tower_does_not_stand_in_the_way_of_ranks_caches_and_budgets(options, tmp_path):
    case = towers(runs=False)
    options = {"cache": tmp_path} if "cache" in options else options
    for _ in range(2):  # the second time from the cache, if there is one
        report = cases.start(case.adapted(), "eva", data=case.batches(), on_unsupported="default", **options)
        assert [row.name for row in report.layers if row.kind == "default"] == ["tower.layer"]
    if "cache" in options:
        refused(case, "eva", case.batches(), LoraInitError, r"'tower\.layer' saw no token", **options)


@pytest.mark.parametrize("method", ["lora-ga", "lora-one", "lora-da"])
def test_a_layer_that_the_loss_does_not_depend_on_is_named_or_left_alone(method):
    case = towers(runs=True)
    message = r"'tower\.layer': the statistics lack .*'weight_gradient'.*the loss does not depend on this layer"
    refused(case, method, case.batches(), LoraInitError, message)
    report = cases.start(case.adapted(), method, data=case.batches(), on_unsupported="default")
    assert [row.name for row in report.layers if row.kind == "default"] == ["tower.layer"]


# --- a weight near the largest number -----------------------------------------------------------------------------


@pytest.mark.parametrize("info", lorainit.available(), ids=lambda info: info.name)
def test_a_weight_near_the_largest_number_is_started_or_named(info):
    if info.name == "loftq":
        pytest.skip("needs a quantized model")

    def adapted() -> nn.Module:
        model = LLAMA.adapted()
        with torch.no_grad(), cases.seeded():
            weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
            weight.copy_(torch.randn_like(weight) * 3e37)
        return model

    model = adapted()
    snapshot = cases.Snapshot.of(model)
    try:
        report = cases.start(model, info.name, data=LLAMA.batches())
    except LoraInitError as error:
        assert any(word in str(error) for word in ("layer '", "batch ", "the loss is nan")), error
        snapshot.assert_unchanged(model)
        if info.needs:  # what the model computes is not finite, with any layer left out
            return
        report = cases.start(adapted(), info.name, data=LLAMA.batches(), on_unsupported="default")
        assert [row.kind for row in report.layers].count("default") == 1
    assert len(report.layers) == 6
