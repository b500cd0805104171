"""Undoing: an adapter and its base come back from any form to any form, and so do the switches of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorainit
from cases import CONV, GPT2, LLAMA, Snapshot, seeded
from lorainit import LoraSite
from lorainit.adapter.undo import Undo, all_or_nothing
from lorainit.adapter.write import write_start
from lorainit.methods import Factors


def a_start(site: LoraSite, size: float = 1.0) -> Factors:
    with seeded(7):
        return Factors(size * torch.randn(site.rank, site.in_features), torch.randn(site.out_features, site.rank))


@pytest.mark.parametrize("later", ["offset", "keep", "subtract"])
@pytest.mark.parametrize("earlier", [None, "offset", "keep", "subtract"])
@pytest.mark.parametrize("case", [LLAMA, GPT2, CONV], ids=lambda case: case.name)
def test_undo_puts_adapter_and_base_back_from_any_form_to_any_form(case, earlier, later):
    model = case.adapted()
    sites, _ = lorainit.find_sites(model)
    if earlier:
        for site in sites:
            write_start(site, a_start(site), earlier, Undo())
    before = Snapshot.of(model)
    with pytest.raises(KeyboardInterrupt), all_or_nothing() as undo:
        for site in sites:
            write_start(site, a_start(site, size=3.0), later, undo)
        raise KeyboardInterrupt
    before.assert_unchanged(model, buffers_remade=True)


def test_nothing_is_undone_without_an_exception():
    site = lorainit.find_sites(LLAMA.adapted())[0][0]
    with all_or_nothing() as undo:
        write_start(site, a_start(site), "keep", undo)
    assert all(torch.equal(f, e) for f, e in zip(site.factors(), a_start(site), strict=True))


def test_switches_and_hooks_that_were_left_on_are_put_back():
    model = LLAMA.adapted()
    model.base_model.model.model.layers[0].eval()  # a mixture
    before = Snapshot.of(model)
    disabled = [m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters")]
    undo = Undo()
    undo.remember_switches(model)
    model.disable_adapter_layers()
    model.train(not model.training).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(print)
    undo.restore()
    before.assert_unchanged(model)
    assert [m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters")] == disabled
