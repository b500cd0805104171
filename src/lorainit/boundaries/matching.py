"""Chooses the modules whose boundaries are matched, automatically or by pattern, and their weights in the loss."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ..errors import LoraInitError
from .loss import Weighting, layer_weights
from .tracing import Trace, has_weight_matrix, layers_of

Layers = int | float | str | Sequence[int]
Scope = Literal["both", "encoder", "decoder"]

# modules that feed the activation, by Transformers' model_type: only a check on the trace
_KNOWN = {
    r"wi|wi_0": ("t5", "mt5", "umt5"),
    r"gate_proj": ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    r"intermediate\.dense": ("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2"),
    r"intermediate\.dense|fc1": ("vit", "deit"),
    r"c_fc": ("gpt2", "gpt_neo"),
    r"fc1": ("opt", "bart", "phi", "clip_vision_model", "siglip_vision_model"),
    r"lin1": ("distilbert",),
    r"dense_h_to_4h": ("gpt_neox", "bloom", "falcon"),
    r"pwconv1": ("convnext", "convnextv2"),
}


@dataclasses.dataclass(frozen=True)
class MatchedSite:
    """One module whose pre-activations are matched.

    Attributes:
        name: module path in the base model.
        stack: path of the stack of equal blocks that it belongs to; empty outside of any.
        layer: position in that stack: one index, or several where stacks are nested.
        weight: c_k, its coefficient in the loss.
        calls: how often it runs in one forward pass.
    """

    name: str
    stack: str
    layer: tuple[int, ...]
    weight: float
    calls: int


@dataclasses.dataclass(frozen=True)
class Matching:
    """The matched sites, in the order in which they run, and how they were found.

    Attributes:
        sites: the sites.
        stop: the first module that begins after the last of them has returned, and lies in another block; None if none.
        details: how they were found, as JSON types.
        warnings: remarks on the choice for the user.
    """

    sites: tuple[MatchedSite, ...]
    stop: str | None
    details: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def calls(self) -> int:
        """How many calls of matched modules one forward pass makes."""
        return sum(site.calls for site in self.sites)


def check_layers(layers: Layers) -> None:
    """Raise ValueError unless ``layers`` is a choice that `match` understands."""
    if isinstance(layers, str):
        if layers != "all" and not re.fullmatch(r"(first|last) \d+|\d+-\d+", layers):
            raise ValueError(f"layers={layers!r} is none of 'all', 'last 6', 'first 6', '16-31'")
    elif isinstance(layers, float):
        if not 0 < layers <= 1:
            raise ValueError(f"layers={layers} as a fraction must be above 0 and at most 1")
    elif isinstance(layers, int):
        if layers < 1:
            raise ValueError(f"layers={layers} must be at least 1 (the last so many of each stack)")
    elif not layers or not all(isinstance(i, int) and i >= 0 for i in layers):
        raise ValueError(f"layers={layers!r} must list layer indices ≥ 0")


def match(
    model: nn.Module,
    trace: Trace,
    sites: str,
    layers: Layers = 0.5,
    scope: Scope = "both",
    weights: Weighting = "sequential",
) -> Matching:
    """Return the matched sites of a model.

    Args:
        model: the model, with or without adapters.
        trace: what one of its forward passes showed.
        sites: ``"auto"`` for the layers that feed a pointwise activation inside a stack of blocks (or anywhere, in a
            model without stacks); or a regular expression for the end of module names (``"query|value"``).
        layers: an integer k for the last k layers of each stack, a fraction for the last part (rounded up), ``"all"``,
            ``"last 6"``, ``"first 6"``, a range ``"16-31"`` (both ends in), or a list of indices.
        scope: of an encoder-decoder, the stacks to match.
        weights: how the coefficients grow within each stack.

    Raises:
        LoraInitError: no such module, or none left after ``layers`` and ``scope``.
    """
    named = layers_of(model)
    ran = Counter(name for name in trace.calls if name in named)
    warnings: list[str] = []
    found = _automatic(model, trace, warnings) if sites == "auto" else _by_pattern(sites, named, ran)
    placed = {name: _place(name, named) for name in dict.fromkeys(trace.calls) if name in found}
    if sites == "auto" and any(stack for stack, _ in placed.values()):
        placed = {name: place for name, place in placed.items() if place[0]}  # heads and poolers stay out
    chosen: dict[str, tuple[float, tuple[int, ...], str]] = {}
    stacks: dict[str, list[int]] = {}
    for stack in dict.fromkeys(stack for stack, _ in placed.values()):
        part = "decoder" if "decoder" in stack.split(".") else "encoder"
        if scope not in ("both", part):
            continue
        inside = {name: place[1] for name, place in placed.items() if place[0] == stack}
        order = list(dict.fromkeys(inside.values()))
        kept = [order[i] for i in _selected(layers, len(order))]
        coefficient = dict(zip(kept, layer_weights(len(kept), weights), strict=True)) if kept else {}
        stacks[stack or "(no stack)"] = [order.index(layer) for layer in kept]
        chosen |= {n: (coefficient[layer], layer, stack) for n, layer in inside.items() if layer in coefficient}
    if not chosen:
        raise LoraInitError(
            f"no matched site is left: sites={sites!r} finds {sorted(placed)[:4]} in {len(placed)} modules, but none "
            f"in layers={layers!r}, scope={scope!r}"
        )
    result = tuple(MatchedSite(n, stack, layer, c, ran[n]) for n, (c, layer, stack) in chosen.items())
    details = {"sites": {s.name: s.weight for s in result}, "chosen_by": sites, "layers_by_stack": stacks}
    return Matching(result, _stop(trace, result), details, tuple(warnings))


def _automatic(model: nn.Module, trace: Trace, warnings: list[str]) -> set[str]:
    """Return the layers that feed an activation; a known architecture that says otherwise gives a warning."""
    if not trace.feeding:
        raise LoraInitError(
            "no matched site: no layer of this model was seen to feed a pointwise activation directly (fused "
            "projections and stacked experts cannot be told apart); name the modules, for example sites='gate_proj'"
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = next((pattern for pattern, kinds in _KNOWN.items() if kind in kinds), None)
    if known is not None and not any(_ends(known, name) for name in trace.feeding):
        warnings.append(
            f"a {kind} model usually feeds its activation from '{known}', but this one was seen to do so from "
            f"{sorted(trace.feeding)[:3]}; name the modules with sites= if that is not meant"
        )
    return trace.feeding


def _ends(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _by_pattern(pattern: str, named: dict[str, nn.Module], ran: Counter[str]) -> set[str]:
    """Return the layers whose names end as the pattern says."""
    try:
        matching = {name for name, module in named.items() if has_weight_matrix(module) and _ends(pattern, name)}
    except re.error as error:
        raise LoraInitError(f"sites={pattern!r} is no regular expression: {error}") from error
    if not matching:
        raise LoraInitError(
            f"no matched site: sites={pattern!r} fits the end of no layer's name; layers are named like "
            f"{[n for n, m in named.items() if has_weight_matrix(m)][:4]}"
        )
    silent = matching - ran.keys()
    if silent == matching:
        raise LoraInitError(f"no matched site: {sorted(matching)[:3]} did not run in a forward pass over the data")
    return matching - silent


def _place(name: str, named: dict[str, nn.Module]) -> tuple[str, tuple[int, ...]]:
    """Return the stack of a module and its position there.

    A number in the path counts where it indexes equal blocks: T5's ``block.5.layer.1`` is block 5, as its sub-layers
    are of different classes, while ConvNeXt's ``stages.0.layers.1`` has two indices.
    """
    parts = name.split(".")
    stack, layer = "", []
    for i, part in enumerate(parts):
        if part.isdigit() and i + 1 < len(parts):
            container = named.get(".".join(parts[:i]))
            if container is not None and len({type(child) for child in container.children()}) == 1:
                stack = stack or ".".join(parts[:i])
                layer.append(int(part))
    return (stack, tuple(layer)) if stack else ("", (list(named).index(name),))


def _selected(layers: Layers, count: int) -> list[int]:
    """Return the chosen positions among ``count`` layers."""
    everything = range(count)
    if isinstance(layers, str):
        if layers == "all":
            return list(everything)
        if found := re.fullmatch(r"(first|last) (\d+)", layers):
            k = int(found[2])
            return list(everything[:k] if found[1] == "first" else everything[-k:])
        first, last = map(int, layers.split("-"))
        return [i for i in everything if first <= i <= last]
    if isinstance(layers, (int, float)):
        k = math.ceil(layers * count) if isinstance(layers, float) else layers
        return list(everything[-k:])
    return [i for i in everything if i in set(layers)]


def _stop(trace: Trace, sites: tuple[MatchedSite, ...]) -> str | None:
    """Return the first module that begins after the last matched call and lies outside of that block."""
    names = {site.name for site in sites}
    last = max(i for i, name in enumerate(trace.calls) if name in names)
    site = next(s for s in sites if s.name == trace.calls[last])
    block = f"{site.stack}.{site.layer[0]}" if site.stack else site.name
    later = (name for calls, name in trace.starts if calls > last)
    return next((name for name in later if name != block and not name.startswith(block + ".")), None)
