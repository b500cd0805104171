"""Finds the layers to start, and refuses what is known to be wrong by now."""

from __future__ import annotations

import dataclasses

from peft.tuners.lora import LoraLayer

from ..adapter.experts import find_experts
from ..adapter.sites import LoraSite, find_sites, lora_layers
from ..adapter.write import check_can_subtract
from ..machine import sharding
from .call import Call, choose, keep_data
from .checks import check_agreement, check_base, check_processes, check_startable, why_not_experts
from .match_rate import check_curvature
from .trained import check_untrained


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is going to be started, and how.

    Attributes:
        call: what the caller asked for.
        sites: the layers to start.
        unsupported: why other layers cannot be started, by name.
        layers: every layer of the adapter by name, in the model's order.
    """

    call: Call
    sites: list[LoraSite]
    unsupported: dict[str, str]
    layers: list[tuple[str, LoraLayer]]


def find(call: Call) -> Plan:
    """Return the layers to start, and why others cannot be.

    Raises:
        LoraInitError: anything that is known to be wrong before a value is computed; see `lorainit.start.checks`.
    """
    sharding.settle(call.model)
    sites, unsupported = find_sites(call.model, call.adapter_name)
    experts, refused = find_experts(call.model, call.adapter_name)
    check_base(call.model, sites)
    spread = any(site.is_sharded for site in sites)  # asking for a factor is then a collective call
    if not spread:
        _check_fresh(call, [*sites, *experts])
    call = choose(call)
    if reason := why_not_experts(call.method, call.rule, call.match_lr):
        refused |= {stack.name: reason for stack in experts}
    sites += [stack for stack in experts if stack.name not in refused]
    found = {site.name for site in sites}
    unsupported = {name: why for name, why in (unsupported | refused).items() if name not in found}
    check_startable(sites, unsupported, call.method, call.skip)
    if call.treatment == "subtract":
        check_can_subtract(call.model, sites)
    check_processes(sites, call)
    if spread:
        _check_fresh(call, sites)
    if call.match_lr == "curvature":
        check_curvature(call.data, call.treatment, call.processes.size, sites)
        call = keep_data(call)
    check_agreement(call, sites)
    return Plan(call, sites, unsupported, lora_layers(call.model, call.adapter_name))


def _check_fresh(call: Call, sites: list[LoraSite]) -> None:
    """Raise if the start would overwrite what the adapter has learned, unless that is asked for or goes on from it."""
    if not (call.overwrite or call.asked.continues):
        check_untrained(call.model, sites, call.adapter_name)
