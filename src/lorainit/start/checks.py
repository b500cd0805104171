"""Refuses what cannot be started, before a single value is computed: layers, processes, tensors, second batches."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from ..adapter import offset
from ..adapter.offset import is_attached
from ..adapter.sites import LoraSite, base_editing_init, config_holders
from ..errors import LoraInitError, UnsupportedLayerError
from ..machine import sharding
from ..methods import Method
from ..methods.method import TrainedMethod
from .budget import RankRule
from .call import Call, options_of


@contextlib.contextmanager
def ordinary_tensors(model: nn.Module) -> Iterator[None]:
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


def check_processes(sites: list[LoraSite], call: Call) -> None:
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


def _check_partitioned(site: LoraSite, call: Call) -> None:
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


def check_agreement(call: Call, sites: list[LoraSite]) -> None:
    """Raise unless all processes start the same layers of the same base in the same way."""
    processes = call.processes
    if processes.size == 1:
        return
    arguments = {
        "method": call.method.info.name,
        **{f"the option {name}": value for name, value in options_of(call.method).items()},
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


def check_base(model: nn.Module, sites: list[LoraSite]) -> None:
    """Raise if the base weights are no longer those that were loaded."""
    # one edited layer is enough for "the base" to be a damaged one, whichever adapter it was edited for
    for _, _, configs in config_holders(model):
        for name, config in configs.items():
            if peft_init := base_editing_init(config):
                raise LoraInitError(
                    f"adapter '{name}' was made with init_lora_weights={peft_init!r}, which has edited the base "
                    "weights; reload the base model and use init_lora_weights=True"
                )
    edited = [s.name for s in sites if any(is_attached(m) and m.base_edited for m in s.layer.lora_A.values())]
    if edited:
        raise LoraInitError(
            f"layer '{edited[0]}': the base was edited by an earlier start with base='subtract'; reload the base model"
        )


def check_startable(sites: list[LoraSite], unsupported: dict[str, str], method: Method, on_unsupported: str) -> None:
    """Raise if a layer cannot be started, unless such layers are to be left alone."""
    if unsupported and on_unsupported == "error":
        listed = "; ".join(f"'{name}': {reason}" for name, reason in unsupported.items())
        raise UnsupportedLayerError(
            f"{method.info.name} cannot start these layers: {listed}. Leave them out of target_modules, or pass "
            "on_unsupported='default' to keep PEFT's default there"
        )


def why_not_experts(method: Method, rule: RankRule, match_lr: bool | Literal["curvature"]) -> str | None:
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


def check_proxies(method: Method, proxies: Iterable[Any] | None) -> None:
    """Raise unless there is a second set of batches just where the method compares with one."""
    if proxies is None:
        if method.comparison == "pairs" or getattr(method, "constraint", None) == "F1p":
            raise LoraInitError(f"{method} compares with pre-training-like data: pass proxy_data=batches")
        return
    if method.comparison is None:
        raise LoraInitError(f"{method} compares with no second set of batches: leave proxy_data out")


def check_rereadable(batches: Iterable[Any] | None, proxies: Iterable[Any] | None) -> None:
    """Raise if one of two sets of batches can be read only once."""
    if proxies is None:
        return
    for name, given in (("data", batches), ("proxy_data", proxies)):
        if isinstance(given, Iterator):
            raise LoraInitError(f"{name} is read more than once here: pass a list or a DataLoader, not an iterator")
