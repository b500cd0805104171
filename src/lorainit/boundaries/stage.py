"""Holds stage 1 of ABM-LoRA, boundary matching: sites, batches, the teacher's targets, the student's losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import switches
from ..adapter.sites import LoraSite
from ..errors import LoraInitError, NonFiniteError
from ..statistics.batches import forward, iterate
from ..statistics.positions import reads_decoder
from .loss import Target, dequantized, quantized, site_loss, squared_error, standard_deviation
from .matching import MatchedSite, match
from .options import Options
from .passes import Call, TruncatedForward, outputs
from .rows import collate, position_mask, read_rows, without_labels
from .signs import Packed, TensorCache, pack, unpack
from .teacher import Teacher, find_teacher
from .tracing import Trace, trace


@dataclasses.dataclass
class Score:
    """How well a site matches its teacher, as sums over entries.

    Attributes:
        loss: Σ of the hinge (or squared error).
        same: entries on the teacher's side.
        active: entries inside the margin or on the wrong side, where the hinge has a gradient.
        entries: entries that count.
    """

    loss: float = 0.0
    same: int = 0
    active: int = 0
    entries: int = 0

    def shares(self) -> dict[str, float]:
        """Return the means as JSON types."""
        n = max(self.entries, 1)
        return {"loss": self.loss / n, "agreement": self.same / n, "active_hinges": self.active / n}


class Stage:
    """The state of stage 1, which both solvers work on; ``with Stage(...)`` frees its cache afterwards.

    Args:
        model: the model, its adapter standing at the origin.
        sites: the LoRA layers to start.
        data: batches as the model takes them.
        options: see `Options`.
        seed: of the order of the rows, and of dropout in train mode.

    Raises:
        LoraInitError: no matched site, an unknown teacher, or one that does not fit.
        NonFiniteError: the teacher's outputs are NaN or infinite.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[LoraSite], data: Iterable[Any], options: Options, seed: int
    ) -> None:
        self.model, self.sites, self.options, self.seed = model, list(sites), options, seed
        self.adapter = sites[0].adapter
        self.device = next(model.parameters()).device
        self.autocast: torch.dtype | None = getattr(torch, options.autocast) if options.autocast else None
        self.half = torch.float16 in (self.autocast, *(p.dtype for p in model.parameters()))
        rows = read_rows(data, options.samples, model)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        held = min(options.held_out, len(rows) // 4)
        self.train_batches = self._batches([rows[i] for i in order if i < len(rows) - held])
        self.held_out_batches = self._batches(rows[len(rows) - held :]) if held else []
        seen = self._trace(rows[order[0]])
        self.matching = match(model, seen, options.sites, options.layers, options.scope, options.weights)
        names = {site.name for site in self.matching.sites}
        last = max(i for i, name in enumerate(seen.calls) if name in names)
        self.reached = {name for calls, name in seen.starts if calls <= last}
        self.teacher: Teacher = find_teacher(model, options.teacher, self.adapter, self.reached)
        self.student_forward = TruncatedForward(model, self.matching, early_stop=options.early_stop)
        own = self.teacher.kind != "model"
        self._teacher_forward = (
            self.student_forward
            if own
            else TruncatedForward(self.teacher.model, self.matching, early_stop=options.early_stop)
        )
        self.cache = TensorCache(options.cache_bytes)
        self.teacher_passes = 0
        self._stack = ExitStack()
        self.margins = [options.margin] * len(self.matching.sites)

    def __enter__(self) -> Stage:
        try:
            self._stack.callback(self.cache.close)
            if self.options.margin_kind == "relative" and self.options.loss == "hinge":
                self.margins = [self.options.margin * s for s in self._deviations()]
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _batches(self, rows: list[Any]) -> list[Any]:
        size = self.options.batch_size
        return [collate(rows[i : i + size], self.model) for i in range(0, len(rows), size)]

    def _trace(self, batch: Any) -> Trace:
        fed = self.on_device(batch)
        with switches.evaluation(self.model):
            with switches.precision(self.device, self.autocast):
                return trace(self.model, lambda: forward(self.model, fed))

    def on_device(self, batch: Any) -> Any:
        """Return a batch as stage 1 feeds it to the model: without labels, on the model's device."""
        (moved,) = iterate([batch], None, None, self.device)
        return without_labels(moved, self.model, self.options.decoder_inputs)

    # --- the teacher ---------------------------------------------------------------------------------------------

    def teacher_outputs(self, key: tuple[str, int], fed: Any) -> dict[Call, Tensor]:
        """Return the teacher's pre-activations on a batch.

        Raises:
            NonFiniteError: one that counts is NaN or infinite, and so has no side; the message names batch and site.
        """
        self.teacher_passes += 1
        with self.teacher.switched(), switches.mode(self.teacher.model, training=False), torch.no_grad():
            with switches.precision(self.device, self.autocast):
                found = outputs(self._teacher_forward, fed)
        for (k, _), z in found.items():
            keep = self.mask(k, z, fed)
            if not bool(torch.isfinite(z if keep is None else z[keep]).all()):
                raise NonFiniteError(
                    f"stage 1, {self._batch_name(key)}: the teacher's output at '{self.matching.sites[k].name}' holds "
                    "NaN or infinity; is there NaN in the data, or in the teacher's weights?"
                )
        return found

    def _batch_name(self, key: tuple[str, int]) -> str:
        """Return the name of a batch for a message; the first steps take the training batches in order."""
        part, index = key
        if part != "train":
            return f"held-out batch {index}"
        stepped = self.options.solver == "gradient" and index < self.options.steps
        return f"training batch {index}" + (f" (step {index})" if stepped else "")

    def targets(self, key: tuple[str, int], fed: Any) -> dict[Call, Target]:
        """Return the teacher's targets on a batch, from the cache where they are held.

        For ``loss="mse"`` the "margin" of a target holds the teacher's values themselves, which are never kept.
        """
        if self.options.loss == "mse":
            return {call: Target(z > 0, z) for call, z in self.teacher_outputs(key, fed).items()}
        if key in self.cache:
            return self._unpacked(self.cache.get(key))
        clipped = self.options.margin_kind == "clipped"
        targets: dict[Call, tuple[Tensor, Tensor | None]] = {}
        for call, z in self.teacher_outputs(key, fed).items():
            targets[call] = (z > 0, quantized(z, self.options.margin) if clipped else None)
        if self.options.cache:
            self.cache.put(key, self._packed(targets))
        return {call: self._target(call, *pair) for call, pair in targets.items()}

    def _target(self, call: Call, active: Tensor, levels: Tensor | None) -> Target:
        if levels is None:
            return Target(active, self.margins[call[0]])
        wide = next(self.model.parameters()).dtype == torch.float64
        return Target(active, dequantized(levels, self.options.margin, torch.float64 if wide else torch.float32))

    def _packed(self, targets: dict[Call, tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        kept: list[Tensor] = []
        for call, (active, levels) in targets.items():
            packed = pack(active)
            kept += [torch.tensor([*call, *packed.shape]), packed.data]
            kept += [levels.cpu() if levels is not None else torch.empty(0, dtype=torch.uint8)]
        return kept

    def _unpacked(self, kept: list[Tensor]) -> dict[Call, Target]:
        found: dict[Call, Target] = {}
        for about, data, levels in zip(kept[::3], kept[1::3], kept[2::3], strict=True):
            k, i, *shape = about.tolist()
            distances = levels.to(self.device) if levels.numel() else None
            found[k, i] = self._target((k, i), unpack(Packed(data, tuple(shape)), self.device), distances)
        return found

    def _deviations(self) -> list[float]:
        """Return the standard deviations of the teacher's pre-activations by site, over the first training batches."""
        squares = [0.0] * len(self.matching.sites)
        batches = self.train_batches[: max(1, self.options.report_batches)]
        for index, batch in enumerate(batches):
            fed = self.on_device(batch)
            for (k, _), z in self.teacher_outputs(("train", index), fed).items():
                squares[k] += standard_deviation(z, self.mask(k, z, fed)) ** 2 / self.matching.sites[k].calls
        return [(s / len(batches)) ** 0.5 for s in squares]

    # --- the student ---------------------------------------------------------------------------------------------

    def mask(self, k: int, z: Tensor, fed: Any) -> Tensor | None:
        """Return the mask of the positions of a site's output that count; None where all do."""
        name = self.matching.sites[k].name
        return position_mask(name, z, fed, self.model, reads_decoder(name))

    def student(self, train_mode: bool = False) -> ExitStack:
        """Switch the model to the student: its adapter alone, in evaluation mode unless ``train_mode``."""
        stack = ExitStack()
        stack.enter_context(switches.adapter(self.model, self.adapter))
        stack.enter_context(switches.mode(self.model, training=train_mode))
        stack.enter_context(switches.checkpointing(self.model))
        stack.enter_context(switches.precision(self.device, self.autocast))
        return stack

    def losses(
        self, fed: Any, targets: dict[Call, Target], then: Callable[[dict[Call, Tensor]], None] | None = None
    ) -> dict[Call, Tensor]:
        """Run the student and return the unweighted loss of every matched call; ``then`` may run their backward."""
        found: dict[Call, Tensor] = {}
        loss = squared_error if self.options.loss == "mse" else site_loss

        def visit(call: Call, z: Tensor) -> None:
            wanted = targets[call]
            self.check_shape(self.matching.sites[call[0]], z, wanted)
            argument: Any = wanted.margin if self.options.loss == "mse" else wanted
            value = loss(z, argument, self.mask(call[0], z, fed))
            found.setdefault(call, value)  # a recomputed block comes here again; the first value is the loss

        self.student_forward.run(fed, visit, (lambda: then(found)) if then is not None else None)
        return found

    def total(self, losses: dict[Call, Tensor]) -> Tensor:
        """Return L = (1/K) Σ c_k L_k."""
        sites = self.matching.sites
        terms = [value * (sites[k].weight / sites[k].calls) for (k, _), value in losses.items()]
        return torch.stack(terms).sum() / len(sites)

    def check_shape(self, site: MatchedSite, z: Tensor, wanted: Target) -> None:
        """Raise unless a site's output has the shape of the teacher's."""
        if z.shape != wanted.active.shape:
            raise LoraInitError(
                f"matched site '{site.name}': the student's output has shape {tuple(z.shape)}, the teacher's "
                f"{tuple(wanted.active.shape)}"
            )

    @torch.no_grad()
    def scores(self, part: str, batches: list[Any]) -> list[Score]:
        """Return how each site matches, over some batches of ``"train"`` or ``"held_out"`` rows."""
        scores = [Score() for _ in self.matching.sites]
        with self.student():
            for index, batch in enumerate(batches):
                fed = self.on_device(batch)
                targets = self.targets((part, index), fed)

                def visit(call: Call, z: Tensor, fed: Any = fed, targets: dict[Call, Target] = targets) -> None:
                    self._add(scores[call[0]], z, targets[call], call[0], fed)

                self.student_forward.run(fed, visit)
        return scores

    def _add(self, score: Score, z: Tensor, wanted: Target, k: int, fed: Any) -> None:
        self.check_shape(self.matching.sites[k], z, wanted)
        keep = self.mask(k, z, fed)
        entries = z.numel() if keep is None else int(keep.sum()) * z.shape[-1]
        side, active, margin = z > 0, wanted.active, wanted.margin
        zf = z if z.dtype == torch.float64 else z.float()
        if keep is not None:
            side, active, zf = side[keep], active[keep], zf[keep]
            margin = margin[keep] if isinstance(margin, Tensor) else margin
        mse = self.options.loss == "mse"
        slack = (zf - margin) if mse else torch.where(active, -zf, zf).add_(margin).clamp_(min=0)
        score.loss += float(slack.square().sum())
        score.same += int((side == active).sum())
        score.active += int((slack != 0).sum())
        score.entries += entries
