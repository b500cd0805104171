r"""HRP (reconstruction): a short training at a higher rank finds the directions, and the adapter restarts along them.

"HRP: High-Rank Preheating for Superior LoRA Initialization", arXiv:2502.07739; no public code. After a few steps at
rank r_h > r with factors A_h and B_h, with ``B_h A_h = U S Vᵀ``, the preheated weights are discarded and training
starts again from W with

    A = c V_rᵀ,   B = 0

The factors are a reconstruction: c is such that ‖A‖_F is that of the random start which A replaces, so that only the
direction changes. The preheating steps count in any comparison: they are in the report's details and in its time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm

from .._typing import Float, Tensor
from ..adapter import offset, switches
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..errors import LoraInitError, NonFiniteError
from ..numerics.linalg import SVD, canonical_signs, require_rank
from ..numerics.seeds import layer_generator
from ..statistics.batches import iterate, summed_loss
from . import kaiming
from .method import Fit, MethodInfo, TrainedMethod, require_rank_at_most_min
from .registry import register


def factors(A: Float[Tensor, "h in"], B: Float[Tensor, "out h"], rank: int) -> Factors:
    """Return ``A = V_rᵀ/√3`` and ``B = 0`` from preheated factors. A reconstruction.

    V_r are the leading right singular vectors of ``B_h A_h``, found from the factors alone. PEFT's random A has entries
    of variance 1/(3·in), hence ‖A‖_F² = r/3.

    Args:
        A: A_h, h×in.
        B: B_h, out×h.
        rank: r, at most the number of directions that the preheating moved.

    Raises:
        ValueError: the rank is out of range, or ``B_h A_h`` has fewer than r directions.
    """
    require_rank(A, rank)
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.mT)
    floor = float(S[0]) * torch.finfo(S.dtype).eps * max(A.shape[1], B.shape[0])
    moved = int((S[:rank] > floor).sum())
    if moved < rank:
        raise ValueError(f"the preheating moved the layer along {moved} directions only, fewer than the rank {rank}")
    svd = canonical_signs(SVD(left.Q @ U[:, :rank], S[:rank], Vh[:rank] @ right.Q.mT))
    return Factors(svd.Vh / math.sqrt(3), svd.Vh.new_zeros(B.shape[0], rank))


@register
@dataclasses.dataclass(frozen=True)
class HRP(TrainedMethod):
    """Reconstruction: the row space that a short training at a higher rank ends with; B = 0.

    Args:
        steps: preheating steps, one batch each; the data are taken again from their beginning where they are fewer.
        learning_rate: of AdamW, constant, without weight decay.
        preheat_rank: r_h; default: four times the adapter's rank. Never more than min(in, out).
    """

    steps: int = 20
    learning_rate: float = 1e-3
    preheat_rank: int | None = None

    info: ClassVar = MethodInfo(
        name="hrp",
        summary="A = the row space after a few steps at a higher rank, B = 0",
        paper="arXiv:2502.07739",
        product="zero",
        needs=("forward", "backward", "training"),
        status="reconstruction",
    )

    def __post_init__(self) -> None:
        """Check the options."""
        if not (self.steps >= 1 and self.learning_rate > 0 and (self.preheat_rank is None or self.preheat_rank >= 1)):
            raise ValueError(
                "steps and preheat_rank must be ≥ 1 and learning_rate > 0, "
                f"got {self.steps}, {self.preheat_rank} and {self.learning_rate}"
            )

    def fit(
        self, model: nn.Module, sites: Sequence[LoraSite], data: Iterable[Any], *, seed: int, progress: bool
    ) -> Fit:
        """Preheat all sites together and return what `factors` makes of them."""
        pairs = {site.name: _preheated_pair(site, self._rank(site), seed) for site in sites}
        with switches.evaluation(model), _added(sites, pairs):
            losses = self._preheat(model, pairs, data, progress)
        starts: dict[str, Factors] = {}
        unmoved: list[str] = []
        for site in sites:
            A, B = (offset.trained_factor(module).detach().flatten(1) for module in pairs[site.name])
            try:
                starts[site.name] = factors(A, B, site.rank)
            except ValueError:
                unmoved.append(site.name)
        ranks = {name: offset.trained_factor(pair[0]).shape[0] for name, pair in pairs.items()}
        details = {"steps": self.steps, "losses": losses, "preheat_ranks": ranks, "unmoved": unmoved}
        warned = tuple(f"the preheating gave layer '{name}' no directions: plain LoRA start" for name in unmoved)
        return Fit(starts, details, warned)

    @property
    def reads(self) -> tuple[int | None, int | None]:
        """A batch for every step."""
        return self.steps, None

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the plain LoRA start, which a layer keeps that the preheating does not move."""
        require_rank_at_most_min(site)
        return kaiming.factors(site.out_features, site.in_features, site.rank, generator=generator)

    def _rank(self, site: LoraSite) -> int:
        require_rank_at_most_min(site)
        wanted = self.preheat_rank or 4 * site.rank
        if wanted < site.rank:
            raise LoraInitError(f"layer '{site.name}': preheat_rank {wanted} is below its rank {site.rank}")
        return min(wanted, site.in_features, site.out_features)

    def _preheat(
        self,
        model: nn.Module,
        pairs: dict[str, tuple[nn.Module, nn.Module]],
        data: Iterable[Any],
        progress: bool,
    ) -> list[float]:
        """Train the pairs in place and return the mean loss of every step."""
        parameters = [offset.trained_factor(module) for pair in pairs.values() for module in pair]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        losses: list[float] = []
        device = next(model.parameters()).device
        batches = itertools.chain.from_iterable(iterate(data, None, None, device) for _ in itertools.count())
        bar = tqdm(desc="preheating", total=self.steps, disable=not progress, leave=False)
        for step, batch in enumerate(itertools.islice(batches, self.steps)):
            with torch.enable_grad():
                loss, terms = summed_loss(model, batch)
                loss = loss / terms
            if not torch.isfinite(loss):
                raise NonFiniteError(f"hrp: the loss is {float(loss)} at preheating step {step}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            bar.update()
        bar.close()
        return losses


def _preheated_pair(site: LoraSite, rank: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """Return factors like the site's own, at another rank and in float32 at least, as plain LoRA starts them."""
    generator = layer_generator(seed, site.name)
    start = kaiming.factors(site.out_features, site.in_features, rank, generator=generator)
    pair = copy.deepcopy((site.lora_A, site.lora_B))
    offset.detach(*pair)
    for module, factor in zip(pair, start, strict=True):
        old = offset.trained_factor(module)
        shape = (rank, *old.shape[1:]) if factor is start.A else (old.shape[0], rank, *old.shape[2:])
        dtype = torch.promote_types(old.dtype, torch.float32)
        module.weight = nn.Parameter(factor.reshape(shape).to(old.device, dtype))
    return pair


@contextlib.contextmanager
def _added(sites: Sequence[LoraSite], pairs: dict[str, tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """Let every base layer add s·B_h A_h x to its output."""

    def hook(site: LoraSite) -> Any:
        lora_A, lora_B = pairs[site.name]
        dtype = offset.trained_factor(lora_A).dtype

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + (site.scaling * lora_B(lora_A(inputs[0].to(dtype)))).to(output.dtype)

        return add

    handles = [site.base_layer.register_forward_hook(hook(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
