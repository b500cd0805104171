"""Counts the pre-activations that lie on the same side of 0 in two states of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..adapter import switches
from ..boundaries.rows import position_mask
from ..boundaries.tracing import layers_of, trace
from ..errors import LoraInitError, NonFiniteError
from ..statistics.batches import forward, take_rows
from ..statistics.positions import reads_decoder

Signs = dict[str, list[Tensor]]


def activated_layers(model: nn.Module, batch: Any) -> list[str]:
    """Return the modules that feed a pointwise activation, in the order in which they run on one row of a batch."""
    row = take_rows(batch, slice(0, 1))
    with switches.evaluation(model):
        found = trace(model, lambda: forward(model, row))
    return [name for name in dict.fromkeys(found.calls) if name in found.feeding]


@contextlib.contextmanager
def watched(model: nn.Module, names: list[str]) -> Iterator[Signs]:
    """Collect, while the block runs the model, which entries of each module's outputs are positive.

    Raises:
        LoraInitError: the model lacks one of the modules.
        NonFiniteError: one of them puts out NaN.
    """
    named = layers_of(model)
    missing = [name for name in names if name not in named]
    if missing:
        raise LoraInitError(f"the teacher {type(model).__name__} has no module '{missing[0]}': it is built otherwise")
    signs: Signs = {name: [] for name in names}

    def hook(name: str) -> Any:
        def keep(_: Any, __: Any, output: Tensor) -> None:
            if output.isnan().any():  # neither side of 0
                raise NonFiniteError(f"module '{name}' of {type(model).__name__} puts out NaN")
            signs[name].append(output.detach() > 0)

        return keep

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.callback(named[name].register_forward_hook(hook(name)).remove)
        yield signs


class Agreement:
    """Counts of equal signs, by module, over the positions that are no padding."""

    def __init__(self, names: list[str]) -> None:
        """Start at zero."""
        self.same, self.entries = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def add(self, student: Signs, teacher: Signs, batch: Any, model: nn.Module) -> None:
        """Compare the signs of one batch.

        Raises:
            LoraInitError: a module's positions cannot be told from padding, it ran another number of times, or it is of
                another width in the teacher.
        """
        for name, own in student.items():
            if len(own) != len(teacher[name]):
                raise LoraInitError(f"module '{name}' ran {len(own)} times, in the teacher {len(teacher[name])} times")
            for signs, wanted in zip(own, teacher[name], strict=True):
                if signs.shape != wanted.shape:
                    raise LoraInitError(
                        f"module '{name}' puts out {list(signs.shape)}, in the teacher {list(wanted.shape)}: it is "
                        "built otherwise"
                    )
                keep = position_mask(name, signs, batch, model, reads_decoder(name))
                same = signs == wanted
                same = same if keep is None else same[keep]
                self.same[name] += int(same.sum())
                self.entries[name] += same.numel()

    def by_module(self) -> dict[str, float]:
        """Return the share of equal signs at each module that ran."""
        return {name: self.same[name] / count for name, count in self.entries.items() if count}

    @property
    def overall(self) -> float | None:
        """The share over all modules; None where none feeds an activation."""
        total = sum(self.entries.values())
        return sum(self.same.values()) / total if total else None
