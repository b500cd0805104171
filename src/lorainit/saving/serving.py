"""What servers ask of an adapter that PEFT does not: said at the start, when the rank can still be chosen."""

from __future__ import annotations

from collections.abc import Iterable

from ..report import LayerReport

# vLLM's values of max_lora_rank; the third is its default
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT = 16


def remarks(layers: Iterable[LayerReport]) -> tuple[str, ...]:
    """Return what a server will make of the adapter as `save_pretrained` writes it exactly, where that needs a word.

    - vLLM serves ranks up to its ``max_lora_rank`` (16 unless set, 512 at most); the offset form saves rank 2r.
    - vLLM and llama.cpp's converter read one ``r`` and one ``lora_alpha`` for all layers, not PEFT's patterns.
    """
    saved = {(r.rank * (2 if r.base in ("offset", "subtract") else 1), r.scaling): r for r in layers if r.rank > 0}
    doubled = [rank for (rank, _), row in saved.items() if rank > row.rank]
    found: list[str] = []
    largest = max(doubled, default=0)
    if largest > _VLLM_RANKS[-1]:
        found.append(
            f"saved exactly, this adapter has rank {largest}: vLLM serves at most {_VLLM_RANKS[-1]}; "
            "save_pretrained(rank=...) truncates it"
        )
    elif largest > _VLLM_DEFAULT and _needed(largest) > max(_VLLM_DEFAULT, _needed(largest // 2)):
        found.append(
            f"saved exactly, this adapter has rank {largest}: vLLM needs max_lora_rank={_needed(largest)} for it; "
            "save_pretrained(rank=...) truncates it"
        )
    if len(saved) > 1:
        pairs = ", ".join(f"rank {rank} at s = {scaling:g}" for rank, scaling in sorted(saved)[:4])
        found.append(
            f"layers differ in rank or scaling ({pairs}): PEFT reads that from the saved patterns, vLLM and llama.cpp "
            "take one r and one lora_alpha for all; merge the adapter to serve it there"
        )
    return tuple(found)


def _needed(rank: int) -> int:
    """Return the smallest max_lora_rank that takes a rank."""
    return next((limit for limit in _VLLM_RANKS if limit >= rank), rank)
