"""Sums in files: the same to the last bit, and no file is left, whatever happens."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

import cases
from cases import LLAMA
from lorainit import LoraInitError, find_sites
from lorainit.statistics import Request, collect
from lorainit.statistics.storage import Storage

STREAMS = ("input_second_moment", "input_sum", "output_gradient_second_moment", "weight_gradient")


def mapped(folder: Path) -> int:
    """How many files of a folder are in this process's memory."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/lorainit-")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sums_in_files_are_the_same_bit_for_bit_and_their_files_go_with_them(tmp_path) -> None:
    model = LLAMA.adapted(torch.float64)
    sites = find_sites(model)[0]
    request = Request(frozenset(STREAMS), dtype=torch.float64)
    data = LLAMA.batches(torch.float64) * 3
    expected, found = (
        collect(model, sites, data, request, storage=storage, progress=False)
        for storage in (Storage(), Storage.of(tmp_path))
    )
    large = 0
    for name, sums in expected.items():
        for stream in STREAMS:
            value = getattr(sums, stream)
            assert torch.equal(getattr(found[name], stream), value)
            large += value.nbytes >= mmap.PAGESIZE
    assert mapped(tmp_path) == large > 0
    assert list(tmp_path.iterdir()) == []  # they have no names any more: kill -9 leaves nothing
    del found
    assert mapped(tmp_path) == 0


@pytest.mark.parametrize("method", ["corda", "lora-da"])
def test_a_start_from_files_is_the_same_start(method, tmp_path) -> None:
    plain, model = LLAMA.adapted(), LLAMA.adapted()
    for each, options in ((plain, {}), (model, {"offload": str(tmp_path)})):
        cases.start(each, method, data=LLAMA.batches(), **options)
    for one, other in zip(find_sites(plain)[0], find_sites(model)[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.factors(), other.factors(), strict=True))


def test_nothing_is_left_where_the_data_fail(tmp_path) -> None:
    def broken():
        yield from LLAMA.batches()
        raise OSError("the disk is gone")

    model = LLAMA.adapted()
    before = cases.Snapshot.of(model)
    with pytest.raises(OSError, match="the disk is gone"):
        cases.start(model, "lora-da", data=broken(), offload=tmp_path)
    before.assert_unchanged(model)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_fills_up_is_an_error_and_the_model_is_as_it_was(tmp_path, monkeypatch) -> None:
    def allocate(descriptor, offset, size):
        if size > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    model = LLAMA.adapted(torch.float64)
    before = cases.Snapshot.of(model)
    request = Request(frozenset(STREAMS), dtype=torch.float64)
    with pytest.raises(LoraInitError, match=r"a sum of 4,608 bytes cannot be kept there .*No space left"):
        collect(model, find_sites(model)[0], LLAMA.batches(), request, storage=Storage.of(tmp_path), progress=False)
    before.assert_unchanged(model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "offload, message",
    [
        ("{}/nowhere", r"offload='.*nowhere': there is no such folder"),
        ("{}/file", r"offload='.*file': there is no such folder"),
        ("/proc", r"offload='/proc': a sum of 1 bytes cannot be kept there"),
        (7, r"offload=7 is neither True, False nor a folder"),
    ],
    ids=["missing", "file", "not writable", "number"],
)
def test_a_folder_that_cannot_take_sums_is_refused_before_anything_runs(offload, message, tmp_path) -> None:
    (tmp_path / "file").touch()

    def untouched():
        pytest.fail("the data were read")
        yield

    with pytest.raises(LoraInitError, match=message):
        cases.start(
            LLAMA.adapted(),
            "eva",
            data=untouched(),
            offload=offload.format(tmp_path) if isinstance(offload, str) else offload,
        )
