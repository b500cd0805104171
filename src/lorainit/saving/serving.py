"""Says what servers make of an adapter that PEFT alone reads right: at the start, when it can still be changed.

By their sources: vLLM (``vllm/lora/peft_helper.py``) scales all layers by lora_alpha / r, or / √r under rsLoRA, of the
config, and refuses DoRA and ``modules_to_save``. llama.cpp's converter keeps ``lora_alpha`` alone, and each layer is
scaled by it over the rank of its own tensors, whatever the config says of rsLoRA and patterns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..report import LayerReport

# vLLM's values of max_lora_rank; the third is its default
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT = 16
_REFUSED = {"use_dora": "DoRA", "modules_to_save": "modules_to_save", "lora_bias": "lora_bias"}


def remarks(layers: Iterable[LayerReport], config: Any | None = None) -> tuple[str, ...]:
    """Return what a server will make of the adapter as `save_pretrained` writes it exactly, where that needs a word.

    Args:
        layers: rows of the report.
        config: the adapter's `LoraConfig`, where there is one.
    """
    saved = {(r.rank * (2 if r.base in ("offset", "subtract") else 1), r.scaling): r for r in layers if r.rank > 0}
    found: list[str] = []
    if refused := [name for field, name in _REFUSED.items() if getattr(config, field, None)]:
        found.append(f"vLLM and llama.cpp serve no adapter with {', '.join(refused)}: merge it to serve it there")
    found += _about_rank(saved)
    if len(saved) > 1:
        pairs = ", ".join(f"rank {rank} at s = {scaling:g}" for rank, scaling in sorted(saved)[:4])
        servers = "vLLM takes one rank and one scaling for all"
        if not _llama_cpp_reads(saved, config):
            servers += ", llama.cpp lora_alpha over each layer's own rank"
        found.append(
            f"layers differ in rank or scaling ({pairs}), which PEFT reads from patterns; {servers}: "
            "save_pretrained(uniform=True) writes what both read"
        )
    elif saved and getattr(config, "use_rslora", False):
        found.append(
            "llama.cpp does not know rsLoRA's scaling: save_pretrained(uniform=True) writes what it and vLLM read"
        )
    return tuple(found)


def _about_rank(saved: dict[tuple[int, float], LayerReport]) -> list[str]:
    """Return what is to be said of ranks that vLLM serves only if told, or not at all."""
    largest = max((rank for (rank, _), row in saved.items() if rank > row.rank), default=0)
    if largest > _VLLM_RANKS[-1]:
        return [
            f"saved exactly, this adapter has rank {largest}: vLLM serves at most {_VLLM_RANKS[-1]}; "
            "save_pretrained(rank=...) truncates it"
        ]
    if largest > _VLLM_DEFAULT and _needed(largest) > max(_VLLM_DEFAULT, _needed(largest // 2)):
        return [
            f"saved exactly, this adapter has rank {largest}: vLLM needs max_lora_rank={_needed(largest)} for it; "
            "save_pretrained(rank=...) truncates it"
        ]
    return []


def _llama_cpp_reads(saved: dict[tuple[int, float], LayerReport], config: Any | None) -> bool:
    """Say whether one alpha over each layer's own rank gives every layer its scaling."""
    alphas = {round(rank * scaling, 9) for rank, scaling in saved}
    return len(alphas) == 1 and not getattr(config, "use_rslora", False)


def _needed(rank: int) -> int:
    """Return the smallest max_lora_rank that takes a rank."""
    return next((limit for limit in _VLLM_RANKS if limit >= rank), rank)
