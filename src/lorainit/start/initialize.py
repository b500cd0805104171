"""`lorainit.initialize`: find, collect, solve, write, finish; all or nothing."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from ..adapter import scaling
from ..adapter.quantized import unpacked
from ..adapter.undo import Undo, all_or_nothing
from ..machine.cost import measure
from ..machine.memory import parse_bytes
from ..machine.precision import uncompiled
from ..machine.processes import Group, Processes, unwrapped
from ..methods import Method, get_method
from ..numerics.seeds import layer_generator
from ..report import InitReport
from ..statistics.storage import Offload, Storage
from .budget import RankRule, Rule
from .call import Call, as_integer, with_batches
from .checks import ordinary_tensors
from .collect import collect
from .data import summed
from .find import find
from .finish import adjust, finish
from .solve import solve
from .write import write

# the default dtype, the filters of warnings and the random state are the process's, not a thread's
_ONE_AT_A_TIME = threading.RLock()


def initialize(
    model: nn.Module,
    method: str | Method,
    *,
    data: Any | None = None,
    processing: Any | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 8,
    loss_function: Callable[[nn.Module, Any], Any] | None = None,
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
    overwrite: bool = False,
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
        data: for methods that need data; the data-free ones leave it untouched. Batches as the model takes them (a
            DataLoader, a list, an iterator, one batch alone); or rows: strings, dictionaries with ``text``,
            ``messages``, ``prompt`` and ``completion``, or tokenized, in a list, a `datasets.Dataset` or
            ``IterableDataset``, or a map-style data set; or a Trainer, whose training batches and loss are taken.
        processing: the tokenizer or processor for rows: it makes tokens of text and pads rows.
        collate_fn: makes a batch of a list of rows, instead.
        batch_size: how many rows make a batch.
        loss_function: (model, batch) -> mean loss, where the loss is not the model's own: DPO, a reward, diffusion, a
            contrastive loss. It is averaged over the rows of all batches. One that returns (summed loss, number of
            terms) is averaged over its terms. For starts from gradients or from a short training, and for
            ``match_lr="curvature"``.
        adapter_name: which adapter to start.
        seed: of everything random in the start, an integer. Each layer draws from its own stream, keyed by its name.
        base: what to do about BA ≠ 0. ``"offset"`` runs y = Wx + s(BA − B₀A₀)x with B₀A₀ frozen, exactly a no-op at
            step 0; ``"keep"`` lets the function move by s·BA; ``"subtract"`` edits the base, W ← W − s·B₀A₀. ``"auto"``
            takes what the method's paper means: offset where the function is to be preserved, else keep; `ABMLoRA`'s
            short training then moves the function in any case.
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
        overwrite: start an adapter that has been trained or loaded, too, whose values are then lost. Without, only a
            fresh one is started, or one that stands where a start has put it. (Not asked for by ``ABMLoRA`` with
            ``origin="keep"``, which goes on from these values.)

    Returns:
        The report: one row a layer; ``print`` it, or ``to_dict()`` for JSON.

    Raises:
        LoraInitError: a wrong argument, a model without LoRA, an adapter that is merged, that has been trained, whose
            base PEFT has edited or whose scaling is 0, or tensors that were made under `torch.inference_mode`.
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
        call = Call(
            model=unwrapped(model),
            asked=get_method(method),
            data=data,
            loss_function=None if loss_function is None else summed(loss_function),
            adapter_name=adapter_name,
            seed=as_integer("seed", seed),
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
            overwrite=overwrite,
        )
        with _turn(processes), ordinary_tensors(call.model), _own_draws(call.model, call.seed):
            call = with_batches(call, processing=processing, collate_fn=collate_fn, batch_size=batch_size)
            return _initialize(call, undo)


def _initialize(call: Call, undo: Undo) -> InitReport:
    """Do what `initialize` does, in one of the processes that do it."""
    plan = find(call)
    call = plan.call
    undo.remember_switches(call.model)
    with unpacked(call.model), uncompiled():
        scalings = scaling.begin(call.model, call.adapter_name, undo, needed=bool(call.match_lr))
        with measure() as cost:
            sums = collect(plan, undo)
            starts = solve(plan, sums)
            written = write(plan, starts, undo)
            started = adjust(plan, sums, written, scalings, undo)
        return finish(plan, started, cost, scalings, undo)


def _turn(processes: Processes) -> contextlib.AbstractContextManager[object]:
    """Let one thread of this process at a time start a model; not where processes wait for each other in turn."""
    return _ONE_AT_A_TIME if processes.size == 1 else contextlib.nullcontext()


def _outside_inference_mode() -> contextlib.AbstractContextManager[object]:
    """Make tensors that can be trained, wherever the caller is."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


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
