"""One pass of the model over the calibration batches for everything that a method needs.

Hooks on the base layers see each layer's input x and, where gradients are asked for, the gradient g at its output. The
weight gradient Σ g xᵀ is formed in the hook, so no parameter needs ``requires_grad`` and no ``.grad`` ever exists; the
backward carries activation gradients only, from the loss down to the first layer that is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..errors import LoraInitError, NonFiniteError
from ..sites import LoraSite
from .batches import LossFunction, MaskKind, count_rows, forward, iterate, position_masks, split_rows, summed_loss
from .layer import LayerStatistics

INPUT_STREAMS = frozenset({"input_second_moment", "input_sum", "input_magnitude"})
GRADIENT_STREAMS = frozenset({"output_gradient_squares", "weight_gradient", "odd_weight_gradient"})


@dataclasses.dataclass(frozen=True)
class Request:
    """What to collect.

    Attributes:
        streams: fields of `LayerStatistics`.
        loss: ``"sum"`` over label terms (independent of the batch size), or ``"sequence_mean"``: the mean over each
            row's own terms, rows run one at a time (the convention of some published code).
        mask: which positions count in the input and output-gradient moments: all but padding, or only those whose
            output is scored. The weight gradient always takes all but padding.
        dtype: of the sums.
        samples: use the first so many rows of the data; None for all.
    """

    streams: frozenset[str]
    loss: Literal["sum", "sequence_mean"] = "sum"
    mask: MaskKind = "attention"
    dtype: torch.dtype = torch.float32
    samples: int | None = None

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self.streams & GRADIENT_STREAMS)


def collect(
    model: nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any],
    request: Request,
    *,
    max_batches: int | None = None,
    memory_budget: int | None = None,
    loss_function: LossFunction | None = None,
    progress: bool = True,
) -> dict[str, LayerStatistics]:
    """Run the base model (adapters off, eval mode) over the data and return the sums of every site by name.

    Layers that receive the very same tensor share one input statistic. The model is left as it was: flags, hooks,
    gradients, also after an exception.

    Args:
        model: the model that holds the sites.
        sites: the layers to watch.
        data: batches as the model takes them. With ``memory_budget`` it is iterated once a group.
        request: what to collect.
        max_batches: stop after so many.
        memory_budget: bytes that the sums may take at a time; layers go in groups that fit.
        loss_function: (model, batch) -> (summed loss, number of terms); default `summed_loss`.
        progress: show a progress bar.

    Raises:
        LoraInitError: no batch, no labels where gradients are needed, a batch that the model refuses, a layer that saw
            no token, or whose positions cannot be told from padding, or that does not fit the budget alone.
        NonFiniteError: NaN or infinity; the message names layer and batch.
    """
    found: dict[str, LayerStatistics] = {}
    arguments: dict[str, Any] = {"max_batches": max_batches, "loss_function": loss_function, "progress": progress}
    for _, statistics in collect_groups(model, sites, data, request, memory_budget=memory_budget, **arguments):
        found |= statistics
    return found


def collect_groups(
    model: nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any],
    request: Request,
    *,
    max_batches: int | None = None,
    memory_budget: int | None = None,
    loss_function: LossFunction | None = None,
    progress: bool = True,
) -> Iterator[tuple[list[LoraSite], dict[str, LayerStatistics]]]:
    """Yield the groups of sites that fit the budget, each with its sums, as `collect` does.

    The next group is only collected when it is asked for: drop the sums of one before that, and no more than the budget
    is ever held.
    """
    groups = _groups(list(sites), request, memory_budget)
    batches = data if len(groups) == 1 or not isinstance(data, Iterator) else list(data)
    for group in groups:
        with _base_only(model), _Watch(model, group, request) as watch:
            bar = tqdm(desc="calibration", unit="batch", disable=not progress, leave=False)
            for batch in iterate(batches, max_batches, request.samples, next(model.parameters()).device):
                watch.run(batch, loss_function or summed_loss)
                bar.update()
            bar.close()
        found, watch.statistics = watch.statistics, {}
        unseen = [name for name, statistics in found.items() if statistics.tokens == 0]
        if unseen:
            raise LoraInitError(f"layer '{unseen[0]}' saw no token of the calibration data ({len(unseen)} such layers)")
        yield group, found
        del found, watch


class _Watch:
    """Hooks on a group of layers, and the sums they fill."""

    def __init__(self, model: nn.Module, sites: list[LoraSite], request: Request) -> None:
        self.model, self.sites, self.request = model, sites, request
        self.statistics = {site.name: LayerStatistics() for site in sites}
        self._handles: list[Any] = []
        self._leader: dict[str, str] = {}
        self._inputs: dict[str, weakref.ref[Tensor]] = {}
        self._masks: dict[str, Tensor] = {}
        self._batch, self._row, self._rows = -1, 0, 0
        self._calls: Counter[str] = Counter()
        self._calls_at_first: Counter[str] = Counter()
        self._in_backward = False

    def __enter__(self) -> _Watch:
        for site in self.sites:
            self._handles.append(site.base_layer.register_forward_hook(self._hook(site)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, batch: Any, loss_function: LossFunction) -> None:
        """Add one batch to the sums."""
        self._batch += 1
        rows = split_rows(batch) if self.request.loss == "sequence_mean" else [batch]
        for part in rows:
            self._row, self._rows = self._row + self._rows, count_rows(part)
            self._masks = position_masks(self.model, part, self.request.mask)
            self._calls.clear()
            self._inputs.clear()
            if self.request.needs_gradients:
                self._forward_backward(part, loss_function)
            else:
                with torch.no_grad(), contextlib.suppress(_LastLayerSeen):
                    forward(self.model, part)
            self._calls_at_first = self._calls_at_first or self._calls.copy()
            for statistics in self.statistics.values():
                statistics.sequences += self._rows
        self._check_finite()

    def _forward_backward(self, batch: Any, loss_function: LossFunction) -> None:
        with torch.enable_grad():
            loss, terms = loss_function(self.model, batch)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"batch {self._batch}: the loss is {float(loss)}")
        if not loss.requires_grad:
            raise LoraInitError("the loss does not depend on any layer that is to be started")
        self._in_backward = True
        try:
            (loss / terms if self.request.loss == "sequence_mean" else loss).backward()
        finally:
            self._in_backward = False
        for statistics in self.statistics.values():
            statistics.labels += terms

    def _hook(self, site: LoraSite) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            x = inputs[0]
            if not self._in_backward:  # a checkpointed block runs again there: its inputs are counted already
                self._add_input(site, x)
                self._calls[site.name] += 1
                if self._is_last_call():
                    raise _LastLayerSeen
            if not (self.request.needs_gradients and torch.is_grad_enabled()):
                return None
            # where nothing upstream needs a gradient the graph begins here; a clone, so that what follows may work in
            # place on it
            result = output if output.requires_grad else output.detach().requires_grad_().clone()
            keep = x.detach() if self.request.streams & {"weight_gradient", "odd_weight_gradient"} else None
            result.register_hook(lambda gradient: self._add_gradient(site, keep, gradient))
            return result

        return hook

    def _is_last_call(self) -> bool:
        """Say whether the rest of the forward pass can be skipped: every layer has run as often as in the first batch.

        Layers that did not run at all in the first batch (an expert without tokens) may run later in this one: then the
        pass is never cut.
        """
        first = self._calls_at_first
        return not self.request.needs_gradients and len(first) == len(self.sites) and self._calls == first

    def _add_input(self, site: LoraSite, x: Tensor) -> None:
        """Add a layer's input to its sums, or to its leader's: the first layer that got the very same tensor."""
        statistics = self.statistics[site.name]
        if site.name not in self._leader:
            same = (name for name, seen in self._inputs.items() if seen() is x)
            self._leader[site.name] = next(same, site.name)
        leader = self._leader[site.name]
        if leader != site.name:
            seen = self._inputs.get(leader)
            if seen is None or seen() is not x:
                raise LoraInitError(f"layer '{site.name}' no longer gets the input of '{leader}': collect it alone")
            for stream in self.request.streams & INPUT_STREAMS:
                setattr(statistics, stream, getattr(self.statistics[leader], stream))
            statistics.tokens = self.statistics[leader].tokens
            return
        self._inputs[site.name] = weakref.ref(x)
        rows = self._counted(site, _positions(site, x.detach()), x)
        statistics.tokens += rows.shape[0]
        if "input_second_moment" in self.request.streams:
            _accumulate_gram(statistics, rows, self.request.dtype)
        if "input_sum" in self.request.streams:
            _add(statistics, "input_sum", rows.to(self.request.dtype).sum(0))
        if "input_magnitude" in self.request.streams:
            _add(statistics, "input_magnitude", rows.to(self.request.dtype).abs().sum(0))

    def _add_gradient(self, site: LoraSite, x: Tensor | None, gradient: Tensor) -> None:
        """Add the gradient at a layer's output; ``x`` is the layer's input where the weight gradient is asked for."""
        statistics = self.statistics[site.name]
        g = _output_positions(site, gradient)
        if "output_gradient_squares" in self.request.streams:
            counted = self._counted(site, g, gradient)
            _add(statistics, "output_gradient_squares", counted.to(self.request.dtype).square().sum(0))
        if x is None:
            return
        rows = _positions(site, x).to(self.request.dtype)
        g = g.to(self.request.dtype)
        if "weight_gradient" in self.request.streams:
            _add(statistics, "weight_gradient", g.mT @ rows)
        if "odd_weight_gradient" in self.request.streams:
            odd = (torch.arange(self._rows, device=g.device) + self._row) % 2 == 1
            keep = odd.repeat_interleave(g.shape[0] // self._rows)
            _add(statistics, "odd_weight_gradient", g[keep].mT @ rows[keep])

    def _counted(self, site: LoraSite, rows: Tensor, tensor: Tensor) -> Tensor:
        """Return the rows (positions × features) that are no padding.

        Raises:
            LoraInitError: there is padding, and the layer's positions cannot be matched with the mask.
        """
        mask = self._masks.get("decoder" if reads_decoder(site.name) else "input")
        if mask is None or bool(mask.all()) or site.kind == "conv":
            return rows
        if rows.shape[0] == mask.numel():
            return rows[mask.flatten()]
        if tensor.dim() == 2 and rows.shape[0] == mask.shape[0]:  # noqa: PLR2004 - one vector a row, after pooling
            return rows
        raise LoraInitError(
            f"layer '{site.name}': {rows.shape[0]} positions do not match the attention mask {list(mask.shape)}, so "
            "padding cannot be told apart; use batches without padding"
        )

    def _check_finite(self) -> None:
        for name, statistics in self.statistics.items():
            for stream in self.request.streams:
                value = getattr(statistics, stream)
                if self._leader.get(name, name) == name and value is not None and not torch.isfinite(value).all():
                    raise NonFiniteError(f"layer '{name}', batch {self._batch}: {stream} is NaN or infinite")


class _LastLayerSeen(Exception):
    """Ends a forward pass after the last layer that is watched."""


@contextlib.contextmanager
def _base_only(model: nn.Module) -> Iterator[None]:
    """Switch adapters, training mode and parameter gradients off, and put them back."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    disabled = [m._disable_adapters for m in layers]
    training = [(m, m.training) for m in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for layer in layers:
            layer._disable_adapters = True
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for layer, flag in zip(layers, disabled, strict=True):
            layer._disable_adapters = flag
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)


def _groups(sites: list[LoraSite], request: Request, budget: int | None) -> list[list[LoraSite]]:
    """Split the sites, in order, into groups whose sums fit the budget (shared inputs counted as if they were not)."""
    if budget is None:
        return [sites]
    groups: list[list[LoraSite]] = [[]]
    held = 0
    for site in sites:
        size = _bytes(site, request)
        if size > budget:
            raise LoraInitError(
                f"layer '{site.name}' alone needs {size:,} bytes of statistics, more than memory_budget ({budget:,})"
            )
        if held + size > budget:
            groups.append([])
            held = 0
        groups[-1].append(site)
        held += size
    return groups


def _bytes(site: LoraSite, request: Request) -> int:
    n, m = site.in_features, site.out_features
    entries = {"input_second_moment": n * n, "weight_gradient": n * m, "odd_weight_gradient": n * m}
    sizes = entries | {"input_sum": n, "input_magnitude": n, "output_gradient_squares": m}
    return sum(sizes[stream] for stream in request.streams) * request.dtype.itemsize


def _positions(site: LoraSite, x: Tensor) -> Tensor:
    """Return a layer's input as (positions, in): tokens, or the unfolded patches of a convolution."""
    if site.kind != "conv":
        return x.reshape(-1, x.shape[-1])
    base: Any = site.base_layer
    padding = base._reversed_padding_repeated_twice  # also what padding="same" comes down to
    x = F.pad(x, padding)
    for axis, (size, stride) in enumerate(zip(base.kernel_size, base.stride, strict=True)):
        x = x.unfold(2 + axis, size, stride)  # (rows, channels, *positions, *kernel)
    dims = len(base.kernel_size)
    x = x.movedim(1, 1 + dims)  # (rows, *positions, channels, *kernel)
    return x.reshape(-1, site.in_features)


def _output_positions(site: LoraSite, gradient: Tensor) -> Tensor:
    """Return a gradient at a layer's output as (positions, out), in the order of `_positions`."""
    if site.kind != "conv":
        return gradient.reshape(-1, gradient.shape[-1])
    return gradient.movedim(1, -1).reshape(-1, site.out_features)


def reads_decoder(name: str) -> bool:
    """Say whether a layer of an encoder-decoder reads decoder positions; cross-attention keys and values do not."""
    parts = name.lower().split(".")
    cross = any(p in ("encdecattention", "encoder_attn", "crossattention") for p in parts)
    return "decoder" in parts and not (cross and parts[-1] in ("k", "v", "k_proj", "v_proj", "key", "value"))


def _accumulate_gram(statistics: LayerStatistics, rows: Tensor, dtype: torch.dtype) -> None:
    rows = rows.to(dtype)
    if statistics.input_second_moment is None:
        statistics.input_second_moment = rows.mT @ rows
    else:
        statistics.input_second_moment.addmm_(rows.mT, rows)


def _add(statistics: LayerStatistics, stream: str, value: Tensor) -> None:
    held = getattr(statistics, stream)
    setattr(statistics, stream, value if held is None else held.add_(value))
