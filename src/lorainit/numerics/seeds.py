"""Random streams: one for each layer, whatever else is drawn."""

from __future__ import annotations

import hashlib

import torch


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for one layer: independent streams by name, the same in any order and on any device."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
