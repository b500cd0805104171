"""Saved statistics: solved again without the model, and refused where anything does not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import cases
import lorainit
from cases import CASES, LLAMA
from lorainit import LoraInitError
from lorainit.statistics import Request, Sketch, collect
from lorainit.statistics.fingerprints import data_fingerprint, model_fingerprint
from lorainit.statistics.store import Origin, load, save


def start(method, cache, *, data=None, r=2, case=LLAMA, change=None, **options):
    model = case.adapted(r=r)
    if change is not None:
        change(model)
    report = cases.start(model, method, data=data, cache=cache, **options)
    return {site.name: tuple(f.clone() for f in site.factors()) for site in lorainit.find_sites(model)[0]}, report


def never_run(model) -> None:
    def refuse(*_):
        raise AssertionError("the model was run")

    model.get_base_model().register_forward_pre_hook(refuse)


def same(one, other) -> None:
    for name, pair in one.items():
        for a, b in zip(pair, other[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_ranks_and_options_are_solved_without_running_the_model(case, tmp_path) -> None:
    _, first = start("corda", tmp_path, data=case.batches(), case=case)
    assert first.details["statistics"]["collected"] is True
    for method, r in ((lorainit.CorDA(), 2), (lorainit.CorDA(damping=0.1), 4)):
        expected, _ = start(method, None, data=case.batches(), r=r, case=case)
        found, report = start(method, tmp_path, data=case.batches(), r=r, case=case, change=never_run)
        same(found, expected)
        assert report.details["statistics"]["collected"] is False
    (file,) = tmp_path.iterdir()
    found, report = start("corda", file, case=case, change=never_run)  # the file itself stands in for the data
    same(found, start("corda", None, data=case.batches(), case=case)[0])
    assert report.details["statistics"] == {"file": str(file), "collected": False, "data": None}


def test_a_request_that_is_covered_finds_the_file_and_another_one_gets_its_own(tmp_path) -> None:
    start("lora-da", tmp_path, data=LLAMA.batches())
    for method in ("lora-da", lorainit.LoRADA(damping=0.5)):
        start(method, tmp_path, data=LLAMA.batches(), change=never_run)
    start("eva", tmp_path, data=LLAMA.batches())  # wants the mean as well
    assert len(list(tmp_path.iterdir())) == 2
    start("corda", tmp_path, data=LLAMA.batches(), change=never_run)
    start("corda", tmp_path, data=LLAMA.batches()[::-1] * 2)  # other data
    assert len(list(tmp_path.iterdir())) == 3


def test_layers_that_share_an_input_share_it_again(tmp_path) -> None:
    model = LLAMA.adapted(torch.float64, target_modules=["q_proj", "v_proj", "down_proj"])
    sites = lorainit.find_sites(model)[0]
    request = Request(frozenset({"input_second_moment", "weight_gradient"}), dtype=torch.float64)
    found = collect(model, sites, LLAMA.batches(), request, progress=False)
    origin = Origin("model", "data")
    save(tmp_path / "s.safetensors", found, request, origin)
    read = load(tmp_path / "s.safetensors", sites, request, origin)
    for site in sites:
        one, other = found[site.name], read[site.name]
        assert (one.tokens, one.sequences, one.labels) == (other.tokens, other.sequences, other.labels)
        for stream in request.streams:
            assert torch.equal(getattr(one, stream), getattr(other, stream))
    groups = [
        [len({id(s[n.name].shared) for n in sites}), len({id(s[n.name].input_second_moment) for n in sites})]
        for s in (found, read)
    ]
    assert groups[0] == groups[1] == [4, 4]


def test_sketches_serve_smaller_ranks_and_whole_sums_serve_sketches(tmp_path) -> None:
    sites = lorainit.find_sites(LLAMA.adapted())[0]
    model = LLAMA.adapted()
    sketched = Request(frozenset({"weight_gradient"}), sketch=Sketch(0, 3, at_least=0.0))
    origin = Origin("m", "d")
    path = tmp_path / "s.safetensors"
    save(
        path, collect(model, lorainit.find_sites(model)[0], LLAMA.batches(), sketched, progress=False), sketched, origin
    )
    smaller = Request(sketched.streams, sketch=Sketch(0, 2, at_least=0.0))
    assert load(path, sites, smaller, origin)[sites[0].name].gradient_range.shape[1] == 3
    for other, message in (
        (Request(sketched.streams, sketch=Sketch(0, 4, at_least=0.0)), "has size [0-9]+, [0-9]+ is needed"),
        (Request(sketched.streams, sketch=Sketch(0, 3, at_least=0.0, seed=1)), "made with seed 0"),
        (Request(sketched.streams), "lack 'weight_gradient'"),
        (Request(sketched.streams, dtype=torch.float64, sketch=sketched.sketch), "dtype='float32', not 'float64'"),
        (Request(sketched.streams, mask="labels", sketch=sketched.sketch), "mask='attention', not 'labels'"),
    ):
        with pytest.raises(LoraInitError, match=message):
            load(path, sites, other, origin)
    whole = Request(sketched.streams)
    save(path, collect(model, lorainit.find_sites(model)[0], LLAMA.batches(), whole, progress=False), whole, origin)
    assert load(path, sites, sketched, origin)[sites[0].name].weight_gradient is not None


def damage(path, how) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "one bit":
        content[-5] ^= 1
    elif how == "empty":
        content = bytearray()
    elif how == "text":
        content = bytearray(b"not statistics at all")
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "one bit", "empty", "text", "foreign", "newer"])
def test_a_damaged_or_foreign_file_is_refused_by_name_and_the_model_is_left_alone(how, tmp_path) -> None:
    start("corda", tmp_path, data=LLAMA.batches())
    (file,) = tmp_path.iterdir()
    if how == "foreign":
        save_file({"x": torch.ones(2)}, file)
    elif how == "newer":
        save_file({"x": torch.ones(2)}, file, {"lorainit": json.dumps({"format": 99})})
    else:
        damage(file, how)
    model = LLAMA.adapted()
    before = cases.Snapshot.of(model)
    for data, cache in ((None, file), (LLAMA.batches(), tmp_path)):
        with pytest.raises(LoraInitError, match=file.name):
            cases.start(model, "corda", data=data, cache=cache)
    before.assert_unchanged(model)


def nudge(model) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "embed" in n)[3, 2] += 1e-3


def test_another_model_or_other_data_are_refused(tmp_path) -> None:
    start("corda", tmp_path, data=LLAMA.batches())
    (file,) = tmp_path.iterdir()
    with pytest.raises(LoraInitError, match="another model"):
        start("corda", file, change=nudge)
    with pytest.raises(LoraInitError, match="other data"):
        start("corda", file, data=LLAMA.batches() * 2)
    with pytest.raises(LoraInitError, match="without data, cache must name"):
        start("corda", tmp_path)
    with pytest.raises(LoraInitError, match="no saved statistics at"):
        start("corda", tmp_path / "absent.safetensors")
    with pytest.raises(LoraInitError, match="does not go with memory_budget"):
        start("corda", tmp_path, data=LLAMA.batches(), memory_budget="1GiB")
    with pytest.raises(LoraInitError, match="needs calibration data"):
        start("corda", None)
    with pytest.raises(LoraInitError, match="lack"):
        start("eva", file)


def test_fingerprints_see_every_value_and_no_adapter() -> None:
    plain, adapted, other = LLAMA.base(), LLAMA.adapted(), LLAMA.adapted()
    assert model_fingerprint(plain) == model_fingerprint(adapted)
    cases.start(adapted, "loram")
    assert model_fingerprint(plain) == model_fingerprint(adapted)
    nudge(other)
    assert model_fingerprint(plain) != model_fingerprint(other)
    data = LLAMA.batches() * 2
    prints = [data_fingerprint(data, *cut) for cut in ((None, None), (1, None), (None, 4), (None, 6))]
    assert prints[0] == prints[3] and len(set(prints)) == 3
    assert data_fingerprint([{**data[0], "labels": data[0]["labels"] + 1}], None, None) != prints[1]


def test_an_iterator_is_read_once_and_serves_both(tmp_path) -> None:
    expected, _ = start("corda", None, data=LLAMA.batches())
    same(start("corda", tmp_path, data=iter(LLAMA.batches()))[0], expected)
    same(start("corda", tmp_path, data=iter(LLAMA.batches()), change=never_run)[0], expected)


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path) -> None:
    path = tmp_path / "s.safetensors"
    script = (
        "import torch, sys\nfrom pathlib import Path\n"
        "from lorainit.statistics import LayerStatistics, Request\nfrom lorainit.statistics.store import Origin, save\n"
        "request = Request(frozenset({'weight_gradient'}))\n"
        "sums = {'a': LayerStatistics(tokens=1, sequences=1, weight_gradient=torch.ones(2000, 2000))}\n"
        "while True:\n    save(Path(sys.argv[1]), sums, request, Origin('m', 'd'))\n    print('saved', flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, env=os.environ)
    assert writer.stdout is not None and writer.stdout.readline()
    time.sleep(0.13)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        assert bool((file.get_tensor("a:weight_gradient") == 1).all())
