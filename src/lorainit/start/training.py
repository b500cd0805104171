"""Runs the short training that some methods start with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..machine.processes import Processes
from ..methods.method import Fit, TrainedMethod
from ..statistics.batches import iterate
from .call import Call


def fit(call: Call, sites: list[LoraSite], batches: Iterable[Any] | None) -> Fit:
    """Run the method's short training, if it has one, and return what it came to.

    Several processes put their data together and all do the same training, as one process would: it is too short to be
    worth the traffic of its gradients. What the first one finds is taken, whatever the rounding of the others.
    """
    method, processes = call.method, call.processes
    if not (isinstance(method, TrainedMethod) and sites):
        return Fit({}, {})
    together = _together(method, batches, processes)
    fit = method.fit(call.model, sites, together, seed=call.seed, progress=call.progress)
    if processes.size == 1:
        return fit
    first = {name: (None, factors) for name, factors in fit.starts.items()} if processes.rank == 0 else {}
    return fit._replace(starts={name: Factors(*tensors) for name, (_, tensors) in processes.pool(first).items()})


def _together(method: TrainedMethod, batches: Iterable[Any] | None, processes: Processes) -> Iterable[Any]:
    """Return the batches that the training takes, of all processes by turns."""
    if processes.size == 1:
        return () if batches is None else batches
    most, rows = (processes.share(limit) for limit in method.reads)
    own = list(iterate(() if batches is None else batches, most, rows, torch.device("cpu"), may_be_empty=True))
    turns = itertools.zip_longest(*processes.exchange(own))
    return [batch for turn in turns for batch in turn if batch is not None]
