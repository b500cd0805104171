"""Computes the start of every layer from what is known about it."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..adapter.experts import Expert, Experts, stack_factors
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..errors import UnsupportedLayerError
from ..machine.precision import own_precision
from ..methods import Method
from ..methods.kaiming import Kaiming
from ..methods.method import start_layer
from ..numerics.seeds import layer_generator
from ..statistics.request import GRADIENT_STREAMS
from .collect import Sums
from .find import Plan
from .share import Done, Known, each_layer


class Solved(NamedTuple):
    """What is told about the start of a layer, beside its factors.

    Attributes:
        weight_norm: |W|.
        seconds: that its computation took.
        remarks: what the method warned of.
    """

    weight_norm: float
    seconds: float
    remarks: tuple[str, ...]


def solve(plan: Plan, sums: Sums) -> Iterator[Done]:
    """Compute the start of every layer, one after the other, as they are asked for.

    A layer that memory ran out on is computed last, from statistics that are collected again for it alone.
    """
    call = plan.call
    work = functools.partial(solve_layer, method=call.method, seed=call.seed)
    starved: list[LoraSite] = []
    for group in sums.groups:
        for done in each_layer(*group, work, call.processes, skip=call.skip):
            if done.starved:
                starved.append(done.site)
            else:
                yield done
    for site in starved:
        sums.calibration.remarks.append(
            f"layer '{site.name}': memory ran out while its start was computed; the data were run again for it alone"
        )
        for group in sums.calibration.groups([site]):
            yield from each_layer(*group, work, call.processes, skip=call.skip, alone=True)


def solve_layer(site: LoraSite, known: Sequence[Known], *, method: Method, seed: int) -> tuple[Solved, Factors]:
    """Compute the start of one layer."""
    begin = time.perf_counter()
    weight_norm = site.weight_norm  # one read of W; raises on NaN or infinity before anything is computed from it
    with own_precision(site.device), warnings.catch_warnings(record=True) as remarks:  # they belong in the layer's row
        warnings.simplefilter("always")
        start = _factors(method, site, seed, known)
    return Solved(weight_norm, time.perf_counter() - begin, tuple(str(r.message) for r in remarks)), start


def _factors(method: Method, site: LoraSite, seed: int, known: Sequence[Known]) -> Factors:
    """Return the start of a layer; of expert parameters, that of every expert."""
    if not isinstance(site, Experts):
        return start_layer(method, site, layer_generator(seed, site.name), *known[0])
    idle = [_idle(expert, own) for expert, own in zip(site.members, known, strict=True)]
    if None not in idle:
        raise UnsupportedLayerError(f"layer '{site.name}': each of its experts {idle[0]}")
    starts: list[Factors] = []
    remarks: dict[str, list[int]] = {}
    for expert, own, reason in zip(site.members, known, idle, strict=True):
        generator = layer_generator(seed, expert.name)
        if reason is not None:
            remarks.setdefault(f"{reason}: PEFT's default, A random and B zero", []).append(expert.index)
            starts.append(Factors(*(factor.to(expert.device) for factor in Kaiming().start(expert, generator))))
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            starts.append(start_layer(method, expert, generator, *own))
        if not any(bool(factor.any()) for factor in starts[-1]):
            raise UnsupportedLayerError(f"'{expert.name}': the start is dead, A = B = 0; is the weight zero?")
        for remark in caught:
            remarks.setdefault(str(remark.message), []).append(expert.index)
    for message, indices in remarks.items():
        which = f"expert{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
        warnings.warn(f"{which}: {message}", stacklevel=2)
    return Factors(*stack_factors(starts))


def _idle(expert: Expert, known: Known) -> str | None:
    """Return why the data say nothing about an expert; None if they do, or where they are not asked."""
    if any(sums.tokens == 0 for sums in known):
        return "saw no token of the calibration data"
    for sums in known:
        whole, odd = sums.weight_gradient, sums.odd_weight_gradient
        gradients = [getattr(sums, stream) for stream in GRADIENT_STREAMS - {"odd_weight_gradient"}]
        if any(gradient is not None and not bool(gradient.any()) for gradient in gradients):
            return "saw tokens, but no loss depends on them"
        if odd is not None and whole is not None and (not bool(odd.any()) or torch.equal(odd, whole)):
            return "saw tokens in one of the halves that are compared only"
    return None
