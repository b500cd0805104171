"""Finds the layers to start, and refuses what is known to be wrong by now."""

from __future__ import annotations

import dataclasses

from peft.tuners.lora import LoraLayer

from ..adapter.experts import find_experts
from ..adapter.sites import LoraSite, find_sites, lora_layers
from ..adapter.write import check_can_subtract
from ..machine import sharding
from .call import Call
from .checks import check_agreement, check_processes, check_startable, why_not_experts
from .match_rate import check_curvature


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
    if reason := why_not_experts(call.method, call.rule, call.match_lr):
        refused |= {stack.name: reason for stack in experts}
    sites += [stack for stack in experts if stack.name not in refused]
    found = {site.name for site in sites}
    unsupported = {name: why for name, why in (unsupported | refused).items() if name not in found}
    check_startable(call.model, call.adapter_name, sites, unsupported, call.method, call.skip)
    if call.treatment == "subtract":
        check_can_subtract(call.model, sites)
    check_processes(sites, call)
    if call.match_lr == "curvature":
        check_curvature(call.data, call.treatment, call.processes.size, sites)
    check_agreement(call, sites)
    return Plan(call, sites, unsupported, lora_layers(call.model, call.adapter_name))
