"""Writing a start into an adapter: what becomes of the base, what is refused, and how everything is put back."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorainit
from cases import CONV, LLAMA, TIED, TWIN, Snapshot, base_tensors, each_case, each_dtype, seeded
from lorainit.adapter import offset
from lorainit.adapter.undo import Undo, all_or_nothing
from lorainit.adapter.write import check_can_subtract, write_start
from lorainit.methods import Factors


def a_start(site, dtype=torch.float32, size=1.0):
    with seeded(7):
        A = size * torch.randn(site.rank, site.in_features)
        return Factors(A.to(dtype), torch.randn(site.out_features, site.rank).to(dtype))


def site_of(model, index=0):
    return lorainit.find_sites(model)[0][index]


def effective(site):
    """The weight that the layer applies, out×in in float64: base plus the adapter's update."""
    update = site.layer.get_delta_weight("default")
    update = update.T if site.kind == "conv1d" else update.flatten(1)
    return site.weight().double() + update.double()


@pytest.mark.parametrize("base", ["offset", "keep", "subtract"])
@each_dtype
@each_case
def test_the_factors_are_stored_rounded_to_the_adapter_s_dtype_and_applied_as_asked(case, dtype, base):
    model = case.adapted(dtype, autocast=False)
    for site in [s for s in lorainit.find_sites(model)[0] if base != "subtract" or s.name != "lm_head"]:
        weight = site.weight().double().clone()
        start = a_start(site, torch.float64)
        A, B = (factor.to(dtype).double() for factor in start)
        held = write_start(site, start, base, Undo())
        assert held == (base != "keep")
        assert all(torch.equal(f.double(), e) for f, e in zip(site.factors(), (A, B), strict=True))
        after = site.weight().double()
        if base == "subtract":
            residual = weight - site.scaling * B @ A
            rounding = torch.finfo(dtype).eps * residual.abs().max() + 1e-6 * (
                residual.abs().max() + weight.abs().max()
            )
            # float64 bases are edited in float64
            rounding = rounding if dtype != torch.float64 else 1e-13
            assert (after - residual).abs().max() <= rounding
        else:
            assert torch.equal(after, weight)
        if base == "offset":
            assert torch.equal(effective(site), weight)
            assert offset.is_attached(site.lora_A) and not site.lora_A.base_edited


@pytest.mark.parametrize("base", ["offset", "keep", "subtract"])
@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_start_with_one_zero_factor_needs_neither_offset_nor_edit(zero, base):
    model = LLAMA.adapted()
    site = site_of(model)
    before = base_tensors(model)
    start = a_start(site)
    start = start._replace(**{zero: torch.zeros_like(getattr(start, zero))})
    assert write_start(site, start, base, Undo()) is False
    assert not offset.is_attached(site.lora_A)
    assert all(torch.equal(f, e) for f, e in zip(site.factors(), start, strict=True))
    assert all(torch.equal(t, before[n]) for n, t in base_tensors(model).items())


BAD = {
    "nan": (lambda f: f._replace(A=f.A * float("nan")), torch.float32, lorainit.NonFiniteError, "not finite"),
    "inf": (lambda f: f._replace(B=f.B / 0), torch.float32, lorainit.NonFiniteError, "not finite"),
    "overflow": (lambda f: f._replace(A=f.A * 1e6), torch.float16, lorainit.NonFiniteError, "float16"),
    "dead": (lambda f: Factors(f.A * 0, f.B * 0), torch.float32, lorainit.UnsupportedLayerError, "never train"),
    "underflow": (lambda f: Factors(f.A * 1e-9, f.B * 1e-9), torch.float16, lorainit.UnsupportedLayerError, "never"),
}


@pytest.mark.parametrize("spoil, dtype, error, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
def test_a_start_that_cannot_train_is_refused_before_anything_is_written(started, spoil, dtype, error, message):
    model = LLAMA.adapted(dtype, autocast=False)
    site = site_of(model)
    if started:
        write_start(site, a_start(site), "offset", Undo())
    before = Snapshot.of(model)
    with pytest.raises(error, match=rf"'model\.layers\.0\.self_attn\.q_proj'.*{message}"):
        write_start(site, spoil(a_start(site)), "offset", Undo())
    before.assert_unchanged(model)


def test_a_trained_bias_of_lora_B_is_refused_by_layer():
    model = CONV.adapted(lora_bias=True)
    site = site_of(model)
    with torch.no_grad():
        site.lora_B.bias.fill_(0.5)
    before = Snapshot.of(model)
    with pytest.raises(lorainit.LoraInitError, match="'strided'.*trained bias"), all_or_nothing() as undo:
        write_start(site, a_start(site), "offset", undo)
    before.assert_unchanged(model)


def test_a_shared_weight_is_not_edited_and_the_other_users_are_named():
    model = TIED.adapted()
    sites, _ = lorainit.find_sites(model)
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"'lm_head'.*would also edit .*embed_tokens\.weight"):
        check_can_subtract(model, sites)
    check_can_subtract(model, [site for site in sites if site.name != "lm_head"])


def test_two_adapted_layers_that_share_a_weight_are_not_edited():
    base = LLAMA.base()
    base.model.layers[1].self_attn.q_proj.weight = base.model.layers[0].self_attn.q_proj.weight
    base.add_adapter(LLAMA.lora_config())
    with pytest.raises(
        lorainit.UnsupportedLayerError, match=r"layers\.0\.self_attn\.q_proj'.*layers\.1\.self_attn\.q_pr"
    ):
        check_can_subtract(base, lorainit.find_sites(base)[0])


def test_a_layer_whose_name_ends_like_the_started_one_s_is_not_taken_for_it():
    base = TWIN.base()
    base.encoder.layers[1]["q"].weight = base.layers[1]["q"].weight
    model = get_peft_model(base, LoraConfig(r=2, target_modules=r"(encoder\.)?layers\.1\.q"))
    sites = {site.name: site for site in lorainit.find_sites(model)[0]}
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"would also edit .*encoder\.layers\.1\.q"):
        check_can_subtract(model, [sites["layers.1.q"]])


class Packed(nn.Parameter):
    """Stands in for the parameter classes of quantization libraries."""


def test_a_weight_of_a_class_of_its_own_is_not_edited():
    model = LLAMA.adapted()
    site = site_of(model)
    site.base_layer.weight = Packed(site.base_layer.weight.detach())
    with pytest.raises(lorainit.UnsupportedLayerError, match="'subtract' cannot edit a Linear"):
        check_can_subtract(model, [site])
