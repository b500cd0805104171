"""Hooks a group of layers and adds up their sums while batches run.

The hooks see each layer's input x and, where gradients are requested, the gradient g at its output. A layer's share of
the weight gradient is computed in the hook, so no parameter needs ``requires_grad`` and no ``.grad`` ever exists; the
backward carries activation gradients only, from the loss down to the first layer of the group.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter.experts import Expert
from ..adapter.sites import LoraSite
from ..errors import LoraInitError, NonFiniteError
from ..numerics.sketches import test_matrix
from .batches import (
    NO_BATCH,
    LossFunction,
    count_rows,
    count_terms,
    describe,
    forward,
    loss_of_output,
    position_masks,
    split_rows,
    without_padding,
)
from .expert_calls import eager_experts, observing
from .inputs import add_inputs
from .layer import LayerStatistics
from .layout import Layout, find_layouts
from .lockstep import Part, Passes
from .output_gradients import add_output_gradients
from .positions import geometry, input_positions, output_positions, select_counted, side
from .request import INPUT_STREAMS, WEIGHT_GRADIENT_STREAMS, Request
from .second_moment import mirror
from .storage import ON_DEVICE, Storage
from .weight_gradients import add_weight_gradient

# a gradient of the weights needs no mask: positions that no loss depends on add zero to it
_BY_POSITION = INPUT_STREAMS | {"output_gradient_squares", "output_gradient_second_moment", "odd_weight_gradient"}


class _Input:
    """An input tensor, for all layers that receive it; its rows and their sketch are computed once.

    The tensor is only held where a gradient will need it: a forward pass frees it as it would without the hooks.
    """

    def __init__(self, site: LoraSite, x: Tensor, dtype: torch.dtype, *, hold: bool) -> None:
        self.tensor, self.geometry = weakref.ref(x), geometry(site)
        self._site, self._held, self._dtype = site, x.detach() if hold else None, dtype
        self._rows: Tensor | None = None
        self._projected: dict[int, Tensor] = {}

    def rows(self) -> Tensor:
        """Return all positions, in the dtype of the sums."""
        if self._rows is None:
            assert self._held is not None
            self._rows, self._held = input_positions(self._site, self._held).to(self._dtype), None
        return self._rows

    def projected(self, test: Tensor) -> Tensor:
        """Return x Ω of all positions."""
        columns = test.shape[1]
        if columns not in self._projected:
            self._projected[columns] = self.rows() @ test
        return self._projected[columns]


class _Counts(NamedTuple):
    """How a part of a batch is counted.

    Attributes:
        rows: how many it has.
        masks: which of its positions count.
        gradients: whether its gradients do.
    """

    rows: int
    masks: dict[str, Tensor]
    gradients: bool


_NOTHING = _Counts(0, {}, False)


class Watch:
    """A context in which a group of layers is watched.

    Attributes:
        statistics: the sums by layer name; complete after `finish`.
    """

    def __init__(
        self, model: nn.Module, sites: list[LoraSite], request: Request, *, storage: Storage = ON_DEVICE
    ) -> None:
        self.model, self.sites, self.request, self.storage = model, sites, request, storage
        self._passes = Passes()
        seed = request.sketch.seed if request.sketch else 0
        self.statistics = {site.name: LayerStatistics(sketch_seed=seed) for site in sites}
        self._streams = {site.name: request.streams_of(site) for site in sites}
        self._tests: dict[tuple[Any, ...], Tensor] = {}
        self._by_position = bool(request.streams & _BY_POSITION)
        self._experts = [site for site in sites if isinstance(site, Expert)]
        self._routed = any(expert.is_routed for expert in self._experts)
        self._attached = contextlib.ExitStack()
        self._leader: dict[str, str] = {}
        self._inputs: dict[str, _Input] = {}
        self._known: dict[int, weakref.ref[_Input]] = {}
        self._counts = _NOTHING
        self._sizes: list[tuple[str, str, Tensor]] = []
        self._batch, self._row = -1, 0
        self._calls: Counter[str] = Counter()
        self._calls_at_first: Counter[str] = Counter()
        self._in_backward = False
        self._layouts: dict[str, Layout] = {}
        self._rows_of_layouts = 0  # in the batch that they were found with: none, one, or more
        self._idle = False  # the model runs for something else than the sums

    def __enter__(self) -> Watch:
        """Attach the hooks, also those on the products of experts."""
        for site in self.sites:
            if not isinstance(site, Expert):
                self._attached.callback(site.base_layer.register_forward_hook(self._hook(site)).remove)
        if self._experts:
            self._attached.enter_context(eager_experts(self._experts))
            self._attached.enter_context(observing(self._experts, self._observe))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self._attached.close()

    def run(
        self,
        batches: Iterable[Any],
        *,
        passes: Passes | None = None,
        loss_function: LossFunction | None = None,
        micro_batch: int | None = None,
    ) -> None:
        """Add batches to the sums.

        Args:
            batches: as the model takes them.
            passes: how the model runs; default: this process holds it whole.
            loss_function: (model, batch) -> (summed loss, number of terms); default: the request's, else the model's.
            micro_batch: so many rows at a time; None: the whole batch. One row at a time where the loss is a mean over
                rows, or where the row or the padding of an expert's tokens has to be known.

        Raises:
            LoraInitError: a batch that the model refuses or that has no labels, positions that cannot be told apart.
            NonFiniteError: NaN or infinity in an input or a gradient.
            MemoryError: memory ran out in another process that runs the same passes.
        """
        self._passes = passes or Passes()
        for part, counts in self._passes.each(self._parts(batches, micro_batch)):
            self._calls.clear()
            self._known.clear()
            self._counts = counts or _NOTHING
            # in step with others, this one runs a backward where they do
            if self.request.needs_gradients and (self._counts.gradients or self._passes.in_step):
                self._forward_backward(part, loss_function or self.request.loss_function)
            else:
                with torch.no_grad(), contextlib.suppress(_LastLayerSeen), self._passes.running():
                    self._run_model(part, loss_function or self.request.loss_function)
            self._calls_at_first = self._calls_at_first or self._calls.copy()
            for statistics in self.statistics.values():
                statistics.sequences += self._counts.rows
            self._row += self._counts.rows
            self._inputs.clear()

    def _parts(self, batches: Iterable[Any], micro_batch: int | None) -> Iterator[Part[_Counts]]:
        """Yield the batches in parts that run at a time; raise if the statistics of one were not finite."""
        for batch in batches:
            self._batch += 1
            self._find_layouts(batch)
            # a part of a batch may have no label that counts, as long as the batch has one: its gradient is zero
            whole = self.request.loss == "sequence_mean" or not count_terms(self.model, batch)
            for part in self._split(batch, micro_batch):
                masks = position_masks(self.model, part, self.request.mask) if self._by_position else {}
                gradients = self.request.needs_gradients and (whole or count_terms(self.model, part) != 0)
                yield part, _Counts(count_rows(part), masks, gradients)
            self._check_finite()

    def _split(self, batch: Any, micro_batch: int | None) -> list[Any]:
        """Return the parts of a batch that run at a time."""
        other = self._routed or "other" in self._layouts.values()
        masks = position_masks(self.model, batch, "attention") if other else {}
        padded = any(not bool(mask.all()) for mask in masks.values())
        by_row = other and "odd_weight_gradient" in self.request.streams
        size = 1 if padded or by_row or self.request.loss == "sequence_mean" else micro_batch
        parts = [batch] if size is None else split_rows(batch, size, self.model)
        return [without_padding(part) for part in parts] if padded else parts

    def _find_layouts(self, batch: Any) -> None:
        """Find how the layers' positions lie, once it matters: where there is padding, or rows are to be told apart.

        One row does not show in which order several lie. Processes that run the same passes go by the shapes.
        """
        rows = min(count_rows(batch), 2)
        if not self._by_position or self._passes.in_step or rows <= self._rows_of_layouts:
            return
        masks = position_masks(self.model, batch, self.request.mask)
        if all(bool(mask.all()) for mask in masks.values()) and "odd_weight_gradient" not in self.request.streams:
            return
        sites = [site for site in self.sites if not isinstance(site, Expert)]
        named = {site.name: masks.get(side(site.name)) for site in sites}
        tokens = {name: mask.numel() // count_rows(batch) for name, mask in named.items() if mask is not None}
        self._idle = True
        try:
            self._layouts = find_layouts(
                self.model, sites, batch, tokens, run=lambda rows: self._run_model(rows, self.request.loss_function)
            )
        except LoraInitError:  # the model refuses the batch: its own pass will say so of the whole batch
            return
        finally:
            self._idle = False
        self._rows_of_layouts = rows

    def finish(self, *, may_miss: bool = False) -> dict[str, LayerStatistics]:
        """Complete the sums and hand them over; those of a layer that saw no token are None, where that ``may_miss``.

        Raises:
            LoraInitError: a layer that saw no token, or none that saw any data.
            NonFiniteError: a sum that overflowed.
        """
        found, self.statistics = self.statistics, {}
        if not any(statistics.sequences for statistics in found.values()):
            raise LoraInitError(NO_BATCH)
        if not may_miss and (unseen := self._unseen(found)):
            kernel = " (or its experts run in a kernel that is not torch's)" if self._routed else ""
            raise LoraInitError(
                f"layer '{unseen[0]}' saw no token of the calibration data{kernel} ({len(unseen)} such layers)"
            )
        done: set[int] = set()
        for name, statistics in found.items():
            for stream in sorted(self._streams[name]):
                value = getattr(statistics, stream)
                if value is None or id(value) in done:
                    continue
                done.add(id(value))
                if stream.endswith("second_moment"):
                    mirror(value)
                if not bool(torch.isfinite(value.sum())):
                    raise NonFiniteError(f"layer '{name}': the sum {stream} overflows")
        return found

    def _unseen(self, found: dict[str, LayerStatistics]) -> list[str]:
        """Return the layers that saw no token; an expert may have seen none if another one of its stack has."""
        seen = {id(site.layer) for site in self.sites if found[site.name].tokens}
        return [site.name for site in self.sites if id(site.layer) not in seen]

    def _forward_backward(self, batch: Any, loss_function: LossFunction | None) -> None:
        with torch.enable_grad():
            loss, terms = self._loss(batch, loss_function)
        self._inputs.clear()  # from here on an input lives as long as the graph needs it
        if self._counts.gradients and terms == 0:
            raise LoraInitError(f"a calibration batch ({describe(batch)}) has no label that counts: all are -100")
        if self._counts.gradients and not torch.isfinite(loss):
            raise NonFiniteError(f"batch {self._batch}: the loss is {float(loss)}")
        if not loss.requires_grad:
            raise LoraInitError("the loss does not depend on any layer that is to be started")
        self._passes.synchronize()
        self._in_backward = True
        try:
            with self._passes.running():
                (loss / terms if self.request.loss == "sequence_mean" else loss).backward()
        finally:
            self._in_backward = False
        for statistics in self.statistics.values():
            statistics.labels += terms if self._counts.gradients else 0

    def _run_model(self, batch: Any, loss_function: LossFunction | None) -> None:
        """Run the model on a batch, as the loss does where there is one of the caller's."""
        if loss_function is None:
            forward(self.model, batch)
        else:
            loss_function(self.model, batch)

    def _loss(self, batch: Any, loss_function: LossFunction | None) -> tuple[Tensor, int]:
        """Return the summed loss, the model's own unless there is another, and the number of its terms."""
        with self._passes.running():
            if loss_function is not None:
                return loss_function(self.model, batch)
            output = forward(self.model, batch)
        return loss_of_output(output, self.model, batch)

    def _hook(self, site: LoraSite) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return None if self._idle else self._observe(site, inputs[0], output)

        return hook

    def _observe(self, site: LoraSite, x: Tensor, output: Tensor) -> Tensor | None:
        """Add a layer's input to its sums; return the output with a hook for its gradient, if that is asked for."""
        seen = self._attempt(self._add_and_record, site, x) if self._counts is not _NOTHING else None
        if self._is_last_call():
            raise _LastLayerSeen
        if not (self.request.needs_gradients and torch.is_grad_enabled()):
            return None
        # where nothing upstream needs a gradient the graph begins here; a clone, so that what follows may work in
        # place on it
        result = output if output.requires_grad else output.detach().requires_grad_().clone()
        keep = seen if self._streams[site.name] & WEIGHT_GRADIENT_STREAMS else None
        if self._counts.gradients:
            result.register_hook(lambda gradient: self._attempt(self._add_gradient, site, keep, gradient))
        return result

    def _attempt(self, work: Callable[..., Any], site: LoraSite, *args: Any) -> Any:
        """Work on sums within a pass, outside the autocast that the pass may run in."""
        with torch.autocast(site.device.type, enabled=False):
            return self._passes.attempt(work, site, *args)

    def _add_and_record(self, site: LoraSite, x: Tensor) -> _Input:
        """Add an input of a layer to its sums, and return its record."""
        seen = self._record_of(site, x)
        if not self._in_backward:  # a checkpointed block runs again there: its inputs are counted already
            self._add_input(site, seen, x)
            self._calls[site.name] += 1
        return seen

    def _record_of(self, site: LoraSite, x: Tensor) -> _Input:
        """Return the record of an input tensor, the same for all layers that receive it."""
        found = self._known[id(x)]() if id(x) in self._known else None
        if found is None or found.tensor() is not x or found.geometry != geometry(site):
            hold = bool(self._streams[site.name] & WEIGHT_GRADIENT_STREAMS) and torch.is_grad_enabled()
            found = _Input(site, x, self.request.dtype, hold=hold)
            self._known[id(x)] = weakref.ref(found)
        return found

    def _is_last_call(self) -> bool:
        """Say whether the rest of the forward pass can be skipped: every layer has run as often as in the first batch.

        Layers that did not run at all in the first batch (an expert without tokens) may run later in this one: then the
        pass is never cut.
        """
        if self.request.needs_gradients or self._passes.in_step:
            return False
        first = self._calls_at_first
        return len(first) == len(self.sites) and self._calls == first

    def _add_input(self, site: LoraSite, seen: _Input, x: Tensor) -> None:
        """Add a layer's input to its sums, or share the sums of its leader, the first layer with the same tensor."""
        statistics, streams = self.statistics[site.name], self._streams[site.name]
        if site.name not in self._leader:
            same = (name for name, other in self._inputs.items() if other is seen and self._can_lead(name, site))
            self._leader[site.name] = next(same, site.name)
        leader = self._leader[site.name]
        if leader != site.name:
            if self._inputs.get(leader) is not seen:
                raise LoraInitError(f"layer '{site.name}' no longer gets the input of '{leader}': collect it alone")
            for stream in (*(streams & INPUT_STREAMS), "tokens", "shared"):
                setattr(statistics, stream, getattr(self.statistics[leader], stream))
            return
        self._inputs[site.name] = seen
        every = input_positions(site, x.detach())
        rows = select_counted(site, every, x, self._counts.masks, self._layouts.get(site.name)).to(self.request.dtype)
        self._sizes.append((site.name, "its inputs", rows.sum()))
        test = self._test("in", site) if "input_sketch" in streams else None
        add_inputs(statistics, rows, streams, test, self.storage)

    def _can_lead(self, name: str, site: LoraSite) -> bool:
        """Say whether two layers with the same input can share its sums: they have the same streams and sketch."""
        other = next(s for s in self.sites if s.name == name)
        sketch = self.request.sketch
        alike = sketch is None or sketch.columns(other) == sketch.columns(site)
        return alike and self._streams[name] & INPUT_STREAMS == self._streams[site.name] & INPUT_STREAMS

    def _add_gradient(self, site: LoraSite, seen: _Input | None, gradient: Tensor) -> None:
        """Add the gradient at a layer's output; ``seen``: the layer's input where the weight gradient is asked for."""
        statistics, streams, dtype = self.statistics[site.name], self._streams[site.name], self.request.dtype
        every = output_positions(site, gradient).to(dtype)
        self._sizes.append((site.name, "its output gradient", every.sum()))
        if streams & {"output_gradient_squares", "output_gradient_second_moment"}:
            rows = select_counted(site, every, gradient, self._counts.masks, self._layouts.get(site.name))
            add_output_gradients(statistics, rows, streams, self.storage)
        if seen is None:
            return
        options: dict[str, Any] = {}
        if "odd_weight_gradient" in streams:
            odd = (torch.arange(self._counts.rows, device=every.device) + self._row) % 2 == 1
            by_row, each = self._layouts.get(site.name) != "tokens first", every.shape[0] // self._counts.rows
            options["odd"] = odd.repeat_interleave(each) if by_row else odd.repeat(each)
        if "gradient_range" in streams:
            options["projected"] = seen.projected(self._test("in", site))
            options["test_out"] = self._test("out", site)
        add_weight_gradient(statistics, every, seen.rows(), streams, storage=self.storage, **options)

    def _test(self, side: Any, site: LoraSite) -> Tensor:
        """Return the test matrix of a layer's inputs, or of its outputs."""
        sketch = self.request.sketch
        assert sketch is not None
        if side == "in":
            key = (side, site.in_features, sketch.columns(site), sketch.seed)
        else:
            key = (side, site.out_features, sketch.rows(site), sketch.seed)
        if key not in self._tests:
            self._tests[key] = test_matrix(*key).to(site.device, self.request.dtype)
        return self._tests[key]

    def _check_finite(self) -> None:
        """Raise if an input or a gradient of this batch holds NaN or infinity: its sum then does, too."""
        sizes, self._sizes = self._sizes, []
        if not sizes or bool(torch.isfinite(torch.stack([size.float() for *_, size in sizes])).all()):
            return
        name, what, _ = next(entry for entry in sizes if not bool(torch.isfinite(entry[2])))
        raise NonFiniteError(f"layer '{name}', batch {self._batch}: NaN or infinite entries in {what}")


class _LastLayerSeen(Exception):
    """Ends a forward pass after the last layer that is watched."""
