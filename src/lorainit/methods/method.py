"""What a method is: a frozen dataclass that is both the configuration and the algorithm."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import nn

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..catalog import MethodInfo, Product
from ..errors import LoraInitError, UnsupportedLayerError
from ..statistics import LayerStatistics, Request
from ..statistics.batches import LossFunction

Comparison = Literal["proxy", "pairs"]


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """Base of every start. Subclasses are frozen dataclasses: their fields are the options, checked when made."""

    info: ClassVar[MethodInfo]
    streams: ClassVar[frozenset[str]] = frozenset()
    # what a start holds beside the sums, at most, in float32 matrices of in×in and of out×in; see benchmarks/scale.py
    copies: ClassVar[tuple[float, float]] = (0.5, 3.0)

    @property
    def request(self) -> Request | None:
        """What has to be collected from calibration data: the class's ``streams``; None for a data-free method."""
        return Request(self.streams) if self.streams else None

    @property
    def product(self) -> Product:
        """What the start's BA means for the base: the class's ``info.product``, unless an option decides it."""
        return self.info.product

    @property
    def comparison(self) -> Comparison | None:
        """Which second set of batches it takes: any (``"proxy"``), one for each batch (``"pairs"``), or none."""
        return None

    @property
    def wants_data(self) -> bool:
        """Whether batches of the task are of use to it."""
        return self.info.needs_data

    @property
    def continues(self) -> bool:
        """Whether it sets out from the values that the adapter has, which may have been trained."""
        return False

    @abc.abstractmethod
    def start(self, *args: Any, **kwargs: Any) -> Factors:
        """Return the start of one layer: ``start(site, generator)``, or ``start(site, generator, statistics)``.

        Args:
            args: the `LoraSite` (its weight as out×in, rank and scaling); a CPU generator of this layer's own, seeded
                from the run's seed and the layer's name; and, only if the method has a `request`, the `LayerStatistics`
                that were collected for the layer.
            kwargs: none.

        Raises:
            UnsupportedLayerError: the method cannot start this layer; the message names it.
        """

    def energies(self, *args: Any, **kwargs: Any) -> Float[Tensor, " k"]:
        """Return what the components of a layer's start are worth, descending: see `lorainit.start.budget.allocate`.

        Args:
            args: the `LoraSite` and, only if the method has a `request`, the layer's `LayerStatistics`.
            kwargs: none.

        Raises:
            LoraInitError: the method's start is no list of components of falling worth, so it gives no variable ranks.
            UnsupportedLayerError: the method cannot start this layer.
        """
        raise LoraInitError(f"{self.info.name} has no components of falling worth")

    def workspace(self, site: LoraSite) -> int:
        """Return about how many bytes the start of a layer takes beside the sums: part of the ``memory_budget``."""
        request, n, m = self.request, site.in_features, site.out_features
        squares, weights = self.copies
        if request is not None and request.streams != request.streams_of(site):  # sketched: solved in float64
            return 12 * request.sum_bytes(site) + int(torch.float32.itemsize * n * m)
        return int(torch.float32.itemsize * (squares * n * n + weights * n * m))

    def rank_limit(self, site: LoraSite) -> int:
        """Return the highest rank that the method can give a layer."""
        return min(site.in_features, site.out_features)


class Fit(NamedTuple):
    """What a short training came to.

    Attributes:
        starts: the factors by layer name; a layer that is missing here stays where `Method.start` has put it.
        details: what happened on the way, as JSON types; it becomes the report's ``details``.
        warnings: what concerns the whole adapter; they become the report's.
    """

    starts: dict[str, Factors]
    details: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainedMethod(Method):
    """A start that is found by training the adapters for a few steps before the training proper.

    `Method.start` is then the point of one layer from which that short training sets out. Under ``base="auto"`` what
    happens to the base is decided there: an offset freezes *that* point's B₀A₀, so that all the training adds takes
    effect. ``"offset"`` and ``"subtract"`` by name hold what they promise: they take the point that it ends at.
    """

    @property
    def reads(self) -> tuple[int | None, int | None]:
        """The most batches, and the most rows, that the training takes of the data; None: no limit."""
        return None, None

    @abc.abstractmethod
    def fit(
        self,
        model: nn.Module,
        sites: Sequence[LoraSite],
        data: Iterable[Any],
        *,
        seed: int,
        progress: bool,
        loss_function: LossFunction | None = None,
    ) -> Fit:
        """Train for a few steps and return the factors; the model, its adapters included, is left as it was.

        Args:
            model: the model that holds the sites, started with `Method.start`.
            sites: the layers that were started.
            data: batches as the model takes them; it may be iterated more than once.
            seed: of everything random.
            progress: show a progress bar.
            loss_function: (model, batch) -> (summed loss, number of terms), where the caller has another loss than the
                model's own.

        Raises:
            LoraInitError: the data or the model do not allow it.
            NonFiniteError: the loss became NaN or infinite.
        """


def start_layer(method: Method, site: LoraSite, generator: torch.Generator, *known: LayerStatistics | None) -> Factors:
    """Return a method's start of a layer, with the statistics only if there are any."""
    return method.start(site, generator, *(statistics for statistics in known if statistics is not None))


def require_choice(name: str, value: str, literal: Any) -> None:
    """Raise ValueError unless ``value`` is one of the strings of a Literal."""
    if value not in get_args(literal):
        raise ValueError(f"{name}={value!r} is not one of {list(get_args(literal))}")


def require_rank_at_most_min(site: LoraSite) -> None:
    """Raise if the site's rank exceeds min(in, out), where a weight has no further directions to give."""
    limit = min(site.in_features, site.out_features)
    if site.rank > limit:
        raise UnsupportedLayerError(
            f"layer '{site.name}': rank {site.rank} exceeds min(in, out) = {limit} of its "
            f"{site.out_features}×{site.in_features} weight; lower r, give this layer its own in rank_pattern, or "
            "leave it out (exclude_modules)"
        )
