"""Puts a model back as it was when something fails half-way: adapters, tensors, config, switches, hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from . import offset, switches
from .sites import LoraSite, owners


class Undo:
    """Remembers what is about to be changed, and puts it back.

    Adapters are small and are copied before they are written; a base weight is copied only where ``base="subtract"``
    edits it.
    """

    def __init__(self) -> None:
        """Start with nothing to undo."""
        self._adapters: list[tuple[LoraSite, list[Tensor], bool | None]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._calls: list[Callable[[], object]] = []

    def remember_adapter(self, site: LoraSite) -> None:
        """Copy the adapter's trained factors and its offset, if it has one."""
        pair = (site.lora_A, site.lora_B)
        copies = [offset.trained_factor(m).detach().clone() for m in pair]
        edited = None
        if offset.is_attached(site.lora_A):
            copies += [m.offset.clone() for m in pair]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            edited = bool(site.lora_A.base_edited)
        self._adapters.append((site, copies, edited))

    def remember_tensor(self, tensor: Tensor) -> None:
        """Copy a tensor that is about to be written in place."""
        self._tensors.append((tensor, tensor.detach().clone()))

    def remember_config(self, model: nn.Module, adapter_name: str) -> None:
        """Note the adapter's config, wherever it is held, and the class of what holds it: others take their places."""
        before = [(owner.configs, owner.configs[adapter_name]) for owner in owners(model, adapter_name)]
        tuners = [(module, type(module)) for module in model.modules() if isinstance(module, BaseTuner)]

        def put_back() -> None:
            for configs, config in before:
                configs[adapter_name] = config
            for tuner, kind in tuners:
                tuner.__class__ = kind

        self.call(put_back)

    def remember_switches(self, model: nn.Module) -> None:
        """Note the model's switches and its forward hooks, for a Ctrl-C that comes while a pass puts them back."""
        put_switches_back = switches.snapshot(model)
        hooks = [(held, dict(held)) for m in model.modules() for held in (m._forward_hooks, m._forward_pre_hooks)]

        def put_back() -> None:
            put_switches_back()
            for held, before in hooks:
                for added in held.keys() - before.keys():
                    del held[added]

        self.call(put_back)

    def call(self, put_back: Callable[[], object]) -> None:
        """Remember a change of another kind by a function that reverts it; the last change is reverted first."""
        self._calls.append(put_back)

    def restore(self) -> None:
        """Put every remembered tensor back, bit for bit, and revert the other changes."""
        with torch.no_grad():
            for tensor, copy in reversed(self._tensors):  # of a tensor remembered twice the first copy counts
                tensor.copy_(copy)
            for site, copies, edited in reversed(self._adapters):
                pair = (site.lora_A, site.lora_B)
                offset.detach(*pair)
                if edited is not None:
                    for module, frozen in zip(pair, copies[2:], strict=True):
                        offset.trained_factor(module).copy_(frozen)
                    offset.attach(*pair, base_edited=edited, experts=site.experts)
                for module, trained in zip(pair, copies[:2], strict=True):
                    offset.trained_factor(module).copy_(trained)
        for put_back in reversed(self._calls):  # last: they may put back modules other than those of the tensors
            put_back()


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Undo]:
    """Yield an `Undo`; on any exception, Ctrl-C included, restore what it remembers and re-raise."""
    undo, gradients = Undo(), torch.is_grad_enabled()
    try:
        yield undo
    except BaseException:
        torch.set_grad_enabled(gradients)  # Ctrl-C may come just before torch.no_grad restores it
        undo.restore()
        raise
