"""`lorainit.initialize`: find the layers, compute their start, write it, report; all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm.auto import tqdm

from ..adapter import offset, scaling
from ..adapter.experts import find_experts
from ..adapter.factors import Factors
from ..adapter.offset import is_attached
from ..adapter.quantized import unpacked
from ..adapter.sites import LoraSite, base_editing_init, find_sites, lora_layers
from ..adapter.undo import Undo, all_or_nothing
from ..adapter.write import Base, check_can_subtract
from ..errors import LoraInitError, UnsupportedLayerError
from ..machine import sharding
from ..machine.cost import measure
from ..machine.memory import parse_bytes
from ..machine.precision import uncompiled
from ..machine.processes import Group, Processes, unwrapped
from ..methods import Method, get_method
from ..methods.auto import Auto, Choice
from ..methods.method import Fit, TrainedMethod
from ..numerics.seeds import layer_generator
from ..report import InitReport, LayerReport
from ..saving import checkpoint, serving
from ..statistics.batches import iterate
from ..statistics.storage import Offload, Storage
from . import match_rate as matching
from .budget import RankRule, Rule
from .collect import Groups, collected_sums, layer_groups, rank_rule, share_out, usable_batches
from .layer import move, row_left_alone, row_without_rank, solve, write
from .share import Known, each_layer

# the default dtype, the filters of warnings and the random state are the process's, not a thread's
_ONE_AT_A_TIME = threading.RLock()


def initialize(
    model: nn.Module,
    method: str | Method,
    *,
    data: Iterable[Any] | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    base: Literal["auto", "offset", "keep", "subtract"] = "auto",
    max_batches: int | None = None,
    memory_budget: int | str | None = None,
    ranks: Rule | RankRule = "fixed",
    micro_batch: int | None = None,
    offload: Offload = False,
    cache: str | os.PathLike[str] | None = None,
    proxy_data: Iterable[Any] | None = None,
    on_unsupported: Literal["error", "default"] = "error",
    match_lr: bool | Literal["curvature"] = False,
    process_group: Group | Literal["default"] | None = "default",
    progress: bool = True,
) -> InitReport:
    """Give the LoRA adapters of a model better starting values, in place.

    Call it once, right after the adapter was added and before an optimizer is made. The base weights stay bit-identical
    (unless ``base="subtract"``); on any failure, Ctrl-C included, the model is as it was. The global random state is
    neither read nor moved: what the data draw from it (the order of a DataLoader) comes from ``seed``. Threads that
    start models take turns.

    Args:
        model: a `peft.PeftModel`, or any module that holds PEFT LoRA layers (Transformers' and Diffusers'
            ``add_adapter``).
        method: a name (see `lorainit.available`) or a method object such as ``lorainit.PiSSA(exact=True)``.
        data: batches as the model takes them, for methods that need them; the data-free methods leave it untouched.
        adapter_name: which adapter to start.
        seed: of everything random in the start, an integer. Each layer draws from its own stream, keyed by its name.
        base: what to do about BA ≠ 0. ``"offset"`` runs y = Wx + s(BA − B₀A₀)x with B₀A₀ frozen, exactly a no-op at
            step 0; ``"keep"`` lets the function move by s·BA; ``"subtract"`` edits the base, W ← W − s·B₀A₀. ``"auto"``
            takes what the method's paper means: offset where the function is to be preserved, else keep.
        max_batches: use at most so many batches of ``data``.
        memory_budget: bytes ("4GiB") that statistics of the data may take at a time; layers then go in groups, and the
            data are run once a group. Default: all layers at once.
        ranks: how the layers get their ranks. ``"fixed"``: as the adapter was made. Else the layers' components compete
            for the sum of those ranks (``"budget"``), for that many parameters (``"cost"``), or every layer takes what
            holds 90 % of its energy (``"energy"``); `lorainit.RankRule` has the options. The scaling of a layer stays;
            a layer that gets rank 0 loses its adapter. Only for methods whose start is a list of components.
        micro_batch: rows of a batch that run at a time while statistics are collected: less memory for activations, the
            same statistics (the loss of a batch must be a mean over its terms, as in Transformers' models).
        offload: keep statistics in CPU memory while the model runs on an accelerator; or in memory-mapped files of this
            folder (on a disk, not a tmpfs), which nothing is left of afterwards.
        cache: where statistics are saved, and found again when the model, the data and what is needed are the same: a
            folder; or a file (``.safetensors``), which may stand in for ``data``. A damaged file, or one of another
            model or other data, is an error. The report's ``details`` name the file. Not with ``memory_budget``.
        proxy_data: batches like those of pre-training, for the constraints of `CNTLoRA` that compare with such.
        on_unsupported: what to do with a layer that the method cannot start (an embedding, r > min(in, out), ...):
            ``"error"``, or ``"default"`` to leave it as it was (PEFT's default, in a fresh adapter), with a warning and
            a row in the report.
        match_lr: express the start at another scale (A/ρ, B/ρ, ρ²s: the same function and subspaces), so that the
            learning rate that suits vanilla LoRA suits it: at any rate of Adam or AdamW its first update is as large
            as vanilla's (or smaller, if it was). ρ stands in the report; the limits in `lorainit.adapter.scaling`.
            ``"curvature"`` then also sees to it that the loss on (eight at most of) the batches of ``data``, with
            labels, is no nearer to instability than with vanilla's start, as `suggest_lr` does: for starts along the
            gradient, such as `LoRAGA`. It costs up to 24 products with the Hessian over them, each about two gradients.
        process_group: the processes that start this model together. Where `torch.distributed` runs with more than one
            process, this function is a **collective call** by default: every process of the default group must make
            it, alike, each with its own shard of ``data`` (an empty one is allowed). The sums over all shards decide,
            the layers' starts are computed in different processes and are then the same in all of them; an error in
            one is an error in all. ``samples`` of a method are shared out, ``max_batches`` and ``memory_budget`` hold
            for each process. A model that FSDP2 shards needs all processes that hold it. None: this process on its own
            (as in ``if rank == 0``); or another group.
        progress: show a progress bar.

    Returns:
        The report: one row a layer; ``print`` it, or ``to_dict()`` for JSON.

    Raises:
        LoraInitError: a wrong argument, a model without LoRA, an adapter that is merged, whose base PEFT has edited or
            whose scaling is 0, or tensors that were made under `torch.inference_mode`.
        UnsupportedLayerError: a layer that the method cannot start.
        NonFiniteError: NaN or infinity in a weight or in the start.

    Example:
        >>> import torch, peft, lorainit
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"]))
        >>> report = lorainit.initialize(model, "loram", progress=False)
        >>> f"{report.layers[0].relative_size:.3f}"   # √(ln 4 / ln 64) · alpha / r
        '1.155'
    """
    processes = Processes(process_group)
    # what is outermost knows of the errors of other processes, too
    with _outside_inference_mode(), all_or_nothing() as undo, processes.failing_together():
        _check_choice("base", base, ("auto", *get_args(Base)))
        _check_choice("on_unsupported", on_unsupported, ("error", "default"))
        _check_choice("match_lr", match_lr, (False, True, "curvature"))
        call = _Call(
            model=unwrapped(model),
            asked=get_method(method),
            data=data,
            adapter_name=adapter_name,
            seed=_as_integer("seed", seed),
            base=base,
            max_batches=max_batches,
            memory_budget=parse_bytes(memory_budget),
            ranks=ranks,
            micro_batch=micro_batch,
            storage=Storage.of(offload),
            cache=cache,
            proxy_data=proxy_data,
            skip=on_unsupported,
            match_lr=match_lr,
            processes=processes,
            progress=progress,
        )
        with _turn(processes), _ordinary_tensors(call.model), _own_draws(call.model, call.seed):
            return _initialize(call, undo)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What `initialize` was asked for, and how `Auto` has chosen."""

    model: nn.Module
    asked: Method
    data: Iterable[Any] | None
    adapter_name: str
    seed: int
    base: Literal["auto", "offset", "keep", "subtract"]
    max_batches: int | None
    memory_budget: int | None
    ranks: Rule | RankRule
    micro_batch: int | None
    storage: Storage
    cache: str | os.PathLike[str] | None
    proxy_data: Iterable[Any] | None
    skip: Literal["error", "default"]
    match_lr: bool | Literal["curvature"]
    processes: Processes
    progress: bool
    chosen: Choice | None = None

    @property
    def method(self) -> Method:
        """The method that computes the start."""
        return self.asked if self.chosen is None else self.chosen.method

    @functools.cached_property
    def rule(self) -> RankRule:
        """How the layers get their ranks."""
        return rank_rule(self.ranks, self.method)

    @property
    def treatment(self) -> Base:
        """What is done about BA."""
        if self.base != "auto":
            return self.base
        return "offset" if self.method.product == "preserve" else "keep"


class _Started(NamedTuple):
    """What came of the layers.

    Attributes:
        rows: of the report, by layer.
        refused: why the method could not start others, by layer.
        warnings: what concerns no single layer.
        details: what the method and the statistics have to tell.
    """

    rows: dict[str, LayerReport]
    refused: dict[str, str]
    warnings: tuple[str, ...]
    details: dict[str, Any]


def _initialize(call: _Call, undo: Undo) -> InitReport:
    """Do what `initialize` does, in one of the processes that do it."""
    call = _chosen(call)
    model, adapter_name = call.model, call.adapter_name
    sites, unsupported = _find(call)
    _check_agreement(call, sites)
    layers = lora_layers(model, adapter_name)
    undo.remember_switches(model)
    with unpacked(model), uncompiled():
        scalings = scaling.begin(model, adapter_name, undo, needed=bool(call.match_lr))
        with measure() as cost:
            started = _start(call, sites, undo)
        unsupported |= started.refused
        left = {n: row_left_alone(n, layer, adapter_name, unsupported[n]) for n, layer in layers if n in unsupported}
        rows = started.rows | left
        report = InitReport(
            method=call.asked.info.name,
            status=call.method.info.status,
            options=_options(call.asked),
            base=call.base,
            adapter_name=adapter_name,
            seed=call.seed,
            layers=tuple(rows[name] for name, _ in layers),
            seconds=cost.seconds,
            peak_bytes=cost.peak_bytes,
            ranks={name: _as_json(value) for name, value in dataclasses.asdict(call.rule).items()},
            warnings=(*started.warnings, *serving.remarks(started.rows.values())),
            details=started.details,
        )
        scaling.finish(model, adapter_name, scalings)
        for name, reason in unsupported.items():
            warnings.warn(f"lorainit left layer '{name}' as it was: {reason}", stacklevel=3)
        checkpoint.mark_started(model, adapter_name, report)
    return report


def _find(call: _Call) -> tuple[list[LoraSite], dict[str, str]]:
    """Return the layers to start, and why others cannot be; raise on what is known to be wrong by now."""
    sharding.settle(call.model)
    sites, unsupported = find_sites(call.model, call.adapter_name)
    experts, refused = find_experts(call.model, call.adapter_name)
    if reason := _not_for_experts(call.method, call.rule, call.match_lr):
        refused |= {stack.name: reason for stack in experts}
    sites += [stack for stack in experts if stack.name not in refused]
    found = {site.name for site in sites}
    unsupported = {name: why for name, why in (unsupported | refused).items() if name not in found}
    _check_startable(call.model, call.adapter_name, sites, unsupported, call.method, call.skip)
    if call.treatment == "subtract":
        check_can_subtract(call.model, sites)
    _check_processes(sites, call)
    if call.match_lr == "curvature":
        matching.check_curvature(call.data, call.treatment, call.processes.size, sites)
    return sites, unsupported


def _start(call: _Call, sites: list[LoraSite], undo: Undo) -> _Started:
    """Compute and write the start of the layers, and what a short training of the method makes of it."""
    method, processes = call.method, call.processes
    details: dict[str, Any] = {"processes": processes.size} if processes.size > 1 else {}
    if call.chosen is not None:
        details["choice"] = call.chosen.to_dict()
    remarks: list[str] = []
    starved: list[LoraSite] = []
    scalings = {site.name: site.scaling for site in sites}
    rows: dict[str, LayerReport] = {}
    refused: dict[str, str] = {}
    batches = usable_batches(method, call.data, call.max_batches, cached=call.cache is not None)
    collecting = functools.partial(
        layer_groups,
        call.model,
        method,
        collected_sums(method, call.rule, call.seed),
        batches,
        call.proxy_data,
        memory_budget=call.memory_budget,
        micro_batch=call.micro_batch,
        storage=call.storage,
        cache=call.cache,
        saved=details,
        remarks=remarks,
        processes=processes,
        progress=call.progress,
    )
    groups = collecting(sites)
    if call.rule.rule != "fixed":
        bare = {site.name: row_without_rank(site) for site in sites}
        kept, groups = share_out(
            call.model, sites, method, call.rule, call.seed, collecting, undo, processes, skip=call.skip
        )
        rows = {name: row for name, row in bare.items() if name not in {site.name for site in kept}}
    solving = functools.partial(solve, method=method, seed=call.seed)
    zero = method.info.product == "zero"
    with tqdm(total=len(sites), desc=f"{method.info.name} start", disable=not call.progress, leave=False) as bar:
        for group, statistics, alone in _and_the_starved(groups, collecting, starved):
            for done in each_layer(group, statistics, solving, processes, skip=call.skip, alone=alone):
                if done.starved:
                    starved.append(done.site)
                    continue
                written = write(done, base=call.treatment, undo=undo, zero=zero, skip=call.skip)
                (rows if isinstance(written, LayerReport) else refused)[done.site.name] = written  # pyright: ignore
                bar.update()
    started = [site for site in sites if site.name in rows]
    fit = _fit(call, started, batches)
    for site in started:
        rows[site.name] = move(site, rows[site.name], fit.starts.get(site.name))
    if call.match_lr:
        rows |= matching.by_magnitude(started, rows)
    if call.match_lr == "curvature":
        assert call.data is not None
        bounded, details["curvature"] = matching.by_curvature(
            call.model, started, rows, call.data, scalings, max_batches=call.max_batches, seed=call.seed
        )
        rows |= bounded
    return _Started(rows, refused, (*remarks, *_starved_remarks(starved), *fit.warnings), fit.details | details)


def _chosen(call: _Call) -> _Call:
    """Make the choice of `Auto`; the fresh adapter is only diagnosed if that can change it."""
    auto = call.asked
    if isinstance(call.data, Iterator) and (isinstance(auto, Auto) or call.match_lr == "curvature"):
        # it is read before or after the start too
        call = dataclasses.replace(call, data=list(itertools.islice(call.data, call.max_batches)))
    if not isinstance(auto, Auto):
        return call
    data = call.data
    features: dict[str, float] = {}
    if data is not None and any(entry.where for entry in auto.table() if entry.helps):
        if sharding.wrapping(call.model) == "fsdp2":
            raise LoraInitError(
                "auto cannot diagnose a model that is sharded by FSDP2; name the method, or pass no data"
            )
        from ..diagnostics.diagnose import diagnose  # needs more than a start does

        most = call.max_batches or 8
        found = diagnose(
            call.model, data, adapter_name=call.adapter_name, max_batches=most, bootstrap=0, seed=call.seed
        )
        features = {name: value for name, value in found.to_dict().items() if isinstance(value, float)}
    choice = auto.choose(features, with_data=data is not None)
    return dataclasses.replace(call, chosen=choice, match_lr=call.match_lr or choice.match_lr)


def _turn(processes: Processes) -> contextlib.AbstractContextManager[object]:
    """Let one thread of this process at a time start a model; not where processes wait for each other in turn."""
    return _ONE_AT_A_TIME if processes.size == 1 else contextlib.nullcontext()


def _outside_inference_mode() -> contextlib.AbstractContextManager[object]:
    """Make tensors that can be trained, wherever the caller is."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


@contextlib.contextmanager
def _ordinary_tensors(model: nn.Module) -> Iterator[None]:
    """Raise `LoraInitError` on tensors that were made under `torch.inference_mode`, where they cannot be worked with.

    Those are the parameters of a model, and batches for which gradients are needed.
    """
    made_there = [name for name, tensor in model.named_parameters() if not is_lazy(tensor) and tensor.is_inference()]
    if made_there:
        raise LoraInitError(
            f"parameter '{made_there[0]}' was made under torch.inference_mode(), so the model cannot be trained; make "
            "it outside"
        )
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Inference tensors cannot"):
            raise
        raise LoraInitError("the batches were made under torch.inference_mode(); make them outside") from error


@contextlib.contextmanager
def _own_draws(model: nn.Module, seed: int) -> Iterator[None]:
    """Let the data draw from the seed what they would draw from the global random state, and leave that as it was.

    A DataLoader without a generator of its own draws its order from it, and a number even where it keeps the order.
    """
    seed = layer_generator(seed, "the order of the data").initial_seed()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _as_integer(name: str, value: Any) -> int:
    """Return an integer of any kind, such as NumPy's, as Python's."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise LoraInitError(f"{name} must be an integer, got {value!r}") from error


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise LoraInitError(f"{name}={value!r} is not one of {list(choices)}")


def _check_processes(sites: list[LoraSite], call: _Call) -> None:
    """Raise unless the processes can do what the method asks, and hold all of a sharded model."""
    method, processes = call.method, call.processes
    if processes.size > 1 and method.request is not None and "odd_weight_gradient" in method.request.streams:
        raise LoraInitError(
            f"{method.info.name} with these options compares halves of the data, every second row each, which "
            f"the shards of {processes.size} processes do not have: use one process, or no cross_fit and damping='auto'"
        )
    sharded = [site for site in sites if site.is_sharded]
    if not sharded:
        return
    weight = sharded[0].base_layer.get_parameter("weight")
    holders = sharding.holders(weight)
    if holders != processes.size:
        raise LoraInitError(
            f"layer '{sharded[0].name}': its weight is sharded over {holders} processes, but {processes.size} are to "
            "start the model; all that hold it must call initialize, with their process_group"
        )
    if sharding.is_partitioned(weight):
        _check_partitioned(sharded[0], call)
        return
    refused = f"layer '{sharded[0].name}' is sharded by FSDP2, where"
    if isinstance(method, TrainedMethod):
        raise LoraInitError(
            f"{refused} {method.info.name} cannot train for its start; start the adapter before fully_shard is applied"
        )
    if call.rule.rule != "fixed":
        raise LoraInitError(
            f"{refused} ranks={call.rule.rule!r} cannot give a layer another rank; start the adapter before "
            "fully_shard is applied"
        )


def _check_partitioned(site: LoraSite, call: _Call) -> None:
    """Raise unless a start is possible where DeepSpeed ZeRO-3 partitions the weights."""
    refused = f"layer '{site.name}' is partitioned by DeepSpeed ZeRO-3, where"
    if call.method.info.needs_data:
        raise LoraInitError(
            f"{refused} only starts from the weights are supported, and {call.method.info.name} needs data; start the "
            "adapter on a base that is loaded without ZeRO-3, save it, and load it here"
        )
    reasons = {"offset": offset.NOT_IN_ZERO3, "subtract": "no process holds the weight that it edits"}
    if reason := reasons.get(call.treatment):
        raise LoraInitError(
            f"{refused} base={call.treatment!r} is not supported: {reason}; use base='keep', ZeRO-2 or FSDP2"
        )


def _check_agreement(call: _Call, sites: list[LoraSite]) -> None:
    """Raise unless all processes start the same layers of the same base in the same way."""
    processes = call.processes
    if processes.size == 1:
        return
    arguments = {
        "method": call.method.info.name,
        **{f"the option {name}": value for name, value in _options(call.method).items()},
        "seed": call.seed,
        "base": call.treatment,
        "ranks": dataclasses.asdict(call.rule),
        "match_lr": call.match_lr,
        "memory_budget": call.memory_budget,
        "cache (or none)": call.cache is not None,
        "proxy_data (or none)": call.proxy_data is not None,
    }
    shapes = {
        f"layer '{s.name}' (kind, out, in, rank, scaling)": (s.kind, s.out_features, s.in_features, s.rank, s.scaling)
        for s in sites
    }
    processes.agree(arguments | shapes)
    # norms, not digests: a weight that is dequantized on another device differs in its last bits
    mine = {site.name: site.weight_norm for site in sites if not site.is_sharded}
    first, *others = processes.exchange(mine)
    for rank, norms in enumerate(others, start=1):
        if differing := [name for name in first if not math.isclose(first[name], norms[name], rel_tol=1e-4)]:
            name = differing[0]
            raise LoraInitError(
                f"layer '{name}': the base weight differs between the processes (its norm is {first[name]:.6g} in "
                f"process 0, {norms[name]:.6g} in process {rank}); load the same model in all of them"
            )


def _check_startable(
    model: nn.Module,
    adapter_name: str,
    sites: list[LoraSite],
    unsupported: dict[str, str],
    method: Method,
    on_unsupported: str,
) -> None:
    """Raise on anything that is known to be wrong before a single value is computed."""
    # one edited layer is enough for "the base" to be a damaged one, whichever adapter it was edited for
    for name, config in getattr(model, "peft_config", {}).items():
        if peft_init := base_editing_init(config):
            raise LoraInitError(
                f"adapter '{name}' was made with init_lora_weights={peft_init!r}, which has edited the base weights; "
                "reload the base model and use init_lora_weights=True"
            )
    edited = [s.name for s in sites if any(is_attached(m) and m.base_edited for m in s.layer.lora_A.values())]
    if edited:
        raise LoraInitError(
            f"layer '{edited[0]}': the base was edited by an earlier start with base='subtract'; reload the base model"
        )
    if unsupported and on_unsupported == "error":
        listed = "; ".join(f"'{name}': {reason}" for name, reason in unsupported.items())
        raise UnsupportedLayerError(
            f"{method.info.name} cannot start these layers: {listed}. Leave them out of target_modules, or pass "
            "on_unsupported='default' to keep PEFT's default there"
        )


def _not_for_experts(method: Method, rule: RankRule, match_lr: bool | Literal["curvature"]) -> str | None:
    """Return why expert parameters cannot be started like this; None if they can."""
    if isinstance(method, TrainedMethod):
        return f"{method.info.name} trains whole layers, and does not know the experts in one"
    if method.comparison == "pairs":
        return f"{method.info.name} compares pairs of positions, and a router sends them to different experts"
    if method.request is not None and method.request.mask == "labels":
        return f"{method.info.name} with mask='labels' asks which positions are scored, which an expert does not see"
    if rule.rule != "fixed":
        return f"ranks={rule.rule!r} does not share out the rank of expert parameters"
    return "match_lr does not go with expert parameters" if match_lr else None


def _fit(call: _Call, sites: list[LoraSite], batches: Iterable[Any] | None) -> Fit:
    """Return what the method's short training came to; nothing for a method without one.

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


def _and_the_starved(
    groups: Groups, collecting: Callable[[list[LoraSite]], Groups], starved: list[LoraSite]
) -> Iterator[tuple[list[LoraSite], dict[str, Known], bool]]:
    """Yield the groups, then each layer that memory ran out on by itself; and whether it is by itself."""
    for group, statistics in groups:
        yield group, statistics, False
        del statistics
    for site in starved:
        for group, statistics in collecting([site]):
            yield group, statistics, True


def _starved_remarks(starved: list[LoraSite]) -> tuple[str, ...]:
    return tuple(
        f"layer '{site.name}': memory ran out while its start was computed; the data were run again for it alone"
        for site in starved
    )


def _options(method: Method) -> dict[str, Any]:
    """Return a method's options as JSON types."""
    return {f.name: _as_json(getattr(method, f.name)) for f in dataclasses.fields(method)}


def _as_json(option: Any) -> Any:
    """Return an option as a JSON type: a nested method's name and options; the class of a module or a state dict."""
    if isinstance(option, Method):
        return {"method": option.info.name, **_options(option)}
    if isinstance(option, os.PathLike):
        return os.fspath(option)
    if isinstance(option, np.generic):
        return option.item()
    tensors = isinstance(option, Mapping) and any(isinstance(value, Tensor) for value in option.values())
    return type(option).__name__ if tensors or isinstance(option, nn.Module) else option
