"""Runs forward passes up to the last matched site and visits the output of each matched site."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..adapter import switches
from ..errors import LoraInitError
from ..statistics.batches import describe, forward
from .matching import Matching
from .tracing import layers_of

Call = tuple[int, int]
Visitor = Callable[[Call, Tensor], None]


class _Stop(Exception):
    """Ends a forward pass after the last matched output."""


class TruncatedForward:
    """Runs one model up to the last matched site.

    Args:
        model: the student's or the teacher's model.
        matching: the matched sites.
        early_stop: end the forward pass after the last matched output; the rest is not needed.

    Raises:
        LoraInitError: the model lacks a matched site (a teacher of another architecture).
    """

    def __init__(self, model: nn.Module, matching: Matching, *, early_stop: bool = True) -> None:
        named = layers_of(model)
        missing = [site.name for site in matching.sites if site.name not in named]
        if missing:
            raise LoraInitError(
                f"the teacher {type(model).__name__} has no module '{missing[0]}' ({len(missing)} of "
                f"{len(matching.sites)} matched sites are missing): it is built otherwise than the student"
            )
        self.model, self.matching, self.early_stop = model, matching, early_stop
        self._modules = [named[site.name] for site in matching.sites]
        self._stop = named.get(matching.stop) if matching.stop is not None else None
        self._blocks_recompute = bool(switches.checkpointed(model))
        repeated = [site.name for site in matching.sites if site.calls > 1]
        if repeated and self._blocks_recompute:
            raise LoraInitError(
                f"matched site '{repeated[0]}' runs several times a pass: switch gradient checkpointing off for it"
            )

    def run(self, batch: Any, visit: Visitor, then: Callable[[], None] | None = None) -> None:
        """Run the model and call ``visit(call, output)`` at each output of a matched site.

        Args:
            batch: as the model takes it.
            visit: ``call`` is (k, i): the i-th call of the k-th site. While ``then`` recomputes a checkpointed block it
                is called again with the same ``call``, and has to compute the same.
            then: run while the hooks are still attached: the backward pass.

        Raises:
            LoraInitError: the model refuses the batch, or a site did not run as often as in the first pass.
        """
        seen = [0] * len(self._modules)
        running = True

        def hook(k: int) -> Any:
            def visit_output(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
                visit((k, seen[k] if running else 0), output)
                seen[k] += running
                # an exception inside a checkpointed block would break its recomputation: stop right after the block
                if running and self.early_stop and sum(seen) == self.matching.calls and not self._blocks_recompute:
                    raise _Stop

            return visit_output

        def stop_early(*_: Any) -> None:
            if running and self.early_stop and sum(seen) == self.matching.calls:
                raise _Stop

        with contextlib.ExitStack() as hooks:
            for k, module in enumerate(self._modules):
                hooks.callback(module.register_forward_hook(hook(k)).remove)
            if self._stop is not None and self._blocks_recompute:
                hooks.callback(self._stop.register_forward_pre_hook(stop_early).remove)
            with contextlib.suppress(_Stop):
                forward(self.model, batch)
            running = False
            if seen != [site.calls for site in self.matching.sites]:
                raise LoraInitError(
                    f"the matched sites ran {sum(seen)} times instead of {self.matching.calls} on a batch "
                    f"({describe(batch)}): modules that only some inputs reach (experts) cannot be matched"
                )
            if then is not None:
                then()


def outputs(passes: TruncatedForward, batch: Any) -> dict[Call, Tensor]:
    """Return the output of every call of a matched site."""
    found: dict[Call, Tensor] = {}
    passes.run(batch, lambda call, output: found.__setitem__(call, output.detach()))
    return found
