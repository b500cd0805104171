"""The report of a start: what it says is what was done, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import lorainit
from cases import CONV, LLAMA, TWIN, Scripted, each_case, each_method, start
from lorainit.adapter import offset


@each_case
@each_method
def test_the_rows_say_what_was_done_to_each_layer(method, case):
    model = case.adapted(torch.float64)
    report = start(model, method, data=case.batches(torch.float64))
    sites, _ = lorainit.find_sites(model)
    assert [row.name for row in report.layers] == [site.name for site in sites]
    for row, site in zip(report.layers, sites, strict=True):
        A, B = site.factors()
        assert (row.kind, row.rank, row.scaling) == (site.kind, site.rank, site.scaling)
        assert row.shape == (B.shape[0], A.shape[1])
        dense = float(site.scaling * (B @ A).norm() / site.weight().norm())
        assert row.relative_size == pytest.approx(dense, rel=1e-6, abs=1e-9)
        held = offset.is_attached(site.lora_A)
        assert (row.base == "offset") == held
        assert row.extra_bytes == (sum(m.offset.nbytes for m in (site.lora_A, site.lora_B)) if held else 0)
        assert 0 <= row.seconds <= report.seconds


def test_the_head_says_what_was_asked_for():
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config())
    method = lorainit.PiSSA(iterations=2)
    report = start(model, method, base="keep", adapter_name="other", seed=11)
    assert (report.method, report.status, report.base) == ("pissa", "paper", "keep")
    assert (report.adapter_name, report.seed) == ("other", 11)
    assert report.options == dataclasses.asdict(method)
    assert report.seconds > 0
    assert report.peak_bytes is None or report.peak_bytes >= 0


def test_a_nested_method_is_reported_by_name_and_options():
    report = start(LLAMA.adapted(), lorainit.LoRAM(reference=lorainit.PiSSA(exact=True)))
    assert report.options["reference"]["method"] == "pissa"
    assert report.options["reference"]["exact"] is True
    json.dumps(report.to_dict(), allow_nan=False)


@each_method
def test_a_report_goes_to_json_and_back(method):
    report = start(TWIN.adapted(), method, data=TWIN.batches())
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert lorainit.InitReport.from_dict(json.loads(text)) == report


def test_the_provenance_holds_the_report_as_it_was_returned(tmp_path):
    model = LLAMA.adapted()
    report = start(model, "loram")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "lorainit.json").read_text())["start"]
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert lorainit.load(LLAMA.adapted(), tmp_path) == report


def test_a_layer_with_zero_weight_has_no_relative_size():
    model = LLAMA.adapted(target_modules=["q_proj"])
    nn.init.zeros_(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight)
    report = start(model, "init-ab")
    assert [row.relative_size is None for row in report.layers] == [True, False]
    assert [line.split()[4] == "-" for line in str(report).splitlines()[3:5]] == [True, False]


def test_the_table_has_one_line_a_layer_with_its_numbers():
    report = start(CONV.adapted(), "loram")
    title, header, rule, *lines, footer = str(report).splitlines()
    assert title.startswith("loram(statistic='mean_square', ") and "seed 0: 5 layers in" in title
    assert header.split() == ["layer", "shape", "r", "s", "|sBA|/|W|", "base", "ms", "KiB"]
    assert set(rule) == {"-"} and len({len(line) for line in (header, rule, *lines)}) == 1
    for line, row in zip(lines, report.layers, strict=True):
        cells = line.split()
        assert cells[:4] == [row.name, f"{row.shape[0]}×{row.shape[1]}", "4", "1.5"]
        assert cells[4:6] == [f"{row.relative_size:.4f}", "offset"]
    assert footer.startswith("saved exactly, this adapter has rank 8")
    assert "saved exactly" not in str(start(CONV.adapted(), "kaiming"))


def test_a_reconstruction_is_labelled():
    report = start(LLAMA.adapted(), "loram")
    assert "[reconstruction]" not in str(report)
    assert "loram [reconstruction](" in str(dataclasses.replace(report, status="reconstruction"))


def test_warnings_follow_the_table():
    def large(site):
        size = 100 * float(site.weight().norm())
        shape = (site.rank, site.in_features), (site.out_features, site.rank)
        return lorainit.Factors(size * torch.ones(shape[0]), torch.ones(shape[1]))

    model = LLAMA.adapted(target_modules=["q_proj"])
    report = start(model, Scripted(large), base="keep")
    first, second = report.layers
    assert "times as large as the weight itself" in first.warnings[0]
    noted = dataclasses.replace(report, warnings=("mind this",))
    assert str(noted).splitlines()[-len(first.warnings + second.warnings) - 1] == "warning: mind this"
    assert f"warning: {first.name}: {first.warnings[0]}" in str(noted).splitlines()


@pytest.mark.parametrize(
    "dropout, base, warned", [(0.1, "subtract", True), (0.0, "subtract", False), (0.1, "offset", 0)]
)
def test_dropout_on_an_edited_base_is_warned_about(dropout, base, warned):
    report = start(LLAMA.adapted(lora_dropout=dropout), "loram", base=base)
    assert all(any("lora_dropout" in w for w in row.warnings) == warned for row in report.layers)


def test_a_layer_left_alone_is_a_row_with_the_reason():
    model = LLAMA.adapted(target_modules=["embed_tokens", "q_proj"])
    with pytest.warns(UserWarning, match="embed_tokens"):
        report = start(model, "loram", on_unsupported="default")
    row = report.layers[0]
    assert (row.name, row.kind, row.base, row.relative_size) == ("model.embed_tokens", "default", "none", None)
    assert row.rank == 4 and row.shape == (16, 40)
    assert "embedding" in row.warnings[0]
    assert "warning: model.embed_tokens: left as it was: embedding" in str(report)
