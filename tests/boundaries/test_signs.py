from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorainit.boundaries.signs import TensorCache, pack, unpack


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5, 7), (2, 0, 4), (17, 16)])
def test_bits_come_back(shape) -> None:
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(flags)
    assert packed.data.numel() == -(-flags.numel() // 8)
    assert torch.equal(unpack(packed), flags)


def test_what_exceeds_the_budget_goes_to_disk_and_is_removed() -> None:
    store = TensorCache(budget=10)
    first, second = torch.arange(8, dtype=torch.uint8), torch.arange(3, 11, dtype=torch.uint8)
    store.put("a", [first])
    store.put("b", [second, first])
    assert (store.bytes_in_memory, store.bytes_on_disk) == (8, 16)
    assert "a" in store and "b" in store and "c" not in store
    assert torch.equal(store.get("a")[0], first)
    assert [t.tolist() for t in store.get("b")] == [second.tolist(), first.tolist()]
    assert store._folder is not None
    folder = Path(store._folder.name)
    assert folder.is_dir()
    store.close()
    assert not folder.exists()
