"""LoRA layers as the methods see them: which there are, their weight as out×in, and which are refused and why."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import lorainit
from cases import LLAMA, PEFT, TIED, TWIN, Attention, Experts, Net, each_case, each_dtype, mixtral, seeded, with_experts
from lorainit.adapter.sites import lora_layers, site_name, trained_shape

KINDS = {
    "llama": {"linear"},
    "tied": {"linear"},
    "gpt2": {"conv1d"},
    "conv": {"conv", "linear"},
    "vit": {"conv", "linear"},
}


def sites_of(model, adapter_name="default"):
    sites, unsupported = lorainit.find_sites(model, adapter_name)
    assert unsupported == {}
    return sites


def as_out_in(site, weight):
    """PEFT's orientation of a weight or an update → out×in."""
    return weight.T if site.kind == "conv1d" else weight.flatten(1)


@each_case
def test_every_layer_of_the_case_is_found_under_its_name_in_the_base(case):
    sites = sites_of(case.adapted())
    base = dict(case.base().named_modules())
    assert {site.kind for site in sites} == KINDS[case.name]
    # the order is the tree's: a tied head is not moved, a layer not visited twice
    assert [s.name for s in sites] == [name for name in base if name.rpartition(".")[2] in case.targets]


@each_dtype
@each_case
def test_a_site_and_peft_agree_on_the_orientation_of_the_update(case, dtype):
    for site in sites_of(case.adapted(dtype, autocast=False)):
        with seeded(), torch.no_grad():
            for module in (site.lora_A, site.lora_B):
                module.weight.copy_(torch.randn(module.weight.shape))
        A, B = site.factors()
        assert A.shape == (site.rank, site.in_features)
        assert B.shape == (site.out_features, site.rank)
        expected = as_out_in(site, site.layer.get_delta_weight("default")).double()
        difference = site.scaling * B.double() @ A.double() - expected
        assert difference.norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


@each_dtype
@each_case
def test_the_weight_is_out_by_in_in_at_least_float32_and_a_view_where_nothing_is_converted(case, dtype):
    for site in sites_of(case.adapted(dtype)):
        stored = site.base_layer.weight
        weight = site.weight()
        assert weight.shape == (site.out_features, site.in_features)
        assert weight.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(weight, as_out_in(site, stored).to(weight.dtype))
        assert site.stored_weight().data_ptr() == stored.data_ptr()
        assert (weight.data_ptr() == stored.data_ptr()) == (weight.dtype == dtype)
        assert not weight.requires_grad


@each_case
def test_the_weight_norm_is_accumulated_in_float64(case):
    for site in sites_of(case.adapted()):
        assert site.weight_norm == pytest.approx(float(site.base_layer.weight.double().norm()), rel=1e-14)


def test_the_norm_of_a_float16_weight_does_not_overflow():
    model = LLAMA.adapted(torch.float16)
    site = sites_of(model)[0]
    with torch.no_grad():
        site.base_layer.weight.fill_(60000.0)
    assert site.weight_norm == pytest.approx(60000 * 16, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_layer(bad):
    site = sites_of(LLAMA.adapted())[2]
    with torch.no_grad():
        site.base_layer.weight[3, 5] = bad
    with pytest.raises(lorainit.NonFiniteError, match=r"'model\.layers\.0\.mlp\.down_proj'"):
        _ = site.weight_norm


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_scaling_follow_the_patterns(rslora):
    patterns = {"rank_pattern": {"^layers.1.q": 2}, "alpha_pattern": {"encoder.layers.1.q": 3, "v": 8}}
    sites = {s.name: s for s in sites_of(TWIN.adapted(use_rslora=rslora, **patterns))}
    for name, (rank, alpha) in {
        "layers.0.q": (4, 6),
        "layers.1.q": (2, 6),
        "encoder.layers.1.q": (4, 3),
        "layers.0.v": (4, 8),
    }.items():
        assert sites[name].rank == rank
        assert sites[name].scaling == pytest.approx(alpha / (rank**0.5 if rslora else rank))
        assert trained_shape(sites[name].lora_A) == (rank, 8)


def test_all_routes_to_a_lora_model_give_the_same_names():
    config = LLAMA.lora_config()
    transformers_route = LLAMA.base()
    transformers_route.add_adapter(config)
    injected = inject_adapter_in_model(LLAMA.lora_config(), LLAMA.base())
    names = [site.name for site in sites_of(LLAMA.adapted())]
    for model in (transformers_route, injected):
        assert [site.name for site in sites_of(model)] == names


def test_only_peft_s_own_prefix_is_stripped():
    assert site_name("base_model.model.a.base_model.model.b") == "a.base_model.model.b"
    assert site_name("model.a") == "model.a"


def test_layers_of_another_adapter_are_left_out():
    model = LLAMA.adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    names = {name.rpartition(".")[2] for name, _ in lora_layers(model, "other")}
    assert names == {"o_proj", "q_proj"}
    assert all(site.rank == 2 for site in sites_of(model, "other"))


def test_a_model_without_lora_is_refused_with_the_way_out():
    with pytest.raises(lorainit.LoraInitError, match=r"LlamaForCausalLM has no PEFT LoRA layers.*get_peft_model"):
        lorainit.find_sites(LLAMA.base())


def test_an_unknown_adapter_is_refused_and_the_present_ones_are_named():
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config())
    with pytest.raises(lorainit.LoraInitError, match=r"'third'; adapters on this model: \['default', 'other'\]"):
        lorainit.find_sites(model, "third")


@pytest.mark.parametrize("merged", ["default", "other"])
def test_a_merged_adapter_is_refused_whether_it_is_the_one_to_start_or_another(merged):
    model = LLAMA.adapted()
    model.add_adapter("other", LLAMA.lora_config())
    model.merge_adapter([merged])
    with pytest.raises(lorainit.LoraInitError, match=rf"q_proj': adapter '{merged}' is merged.*unmerge"):
        lorainit.find_sites(model, "default")


def test_an_adapter_that_is_merged_into_a_layer_without_the_one_to_start_is_refused_too():
    model = LLAMA.adapted(target_modules=["q_proj"])
    model.add_adapter("other", LLAMA.lora_config(target_modules=["v_proj"]))
    model.merge_adapter(["other"])
    with pytest.raises(
        lorainit.LoraInitError, match=r"layers\.0\.self_attn\.v_proj': adapter 'other' is merged.*unmerge"
    ):
        lorainit.find_sites(model, "default")


NOTHING = {
    "lora_alpha": lambda: LLAMA.adapted(lora_alpha=0),
    "alpha_pattern": lambda: LLAMA.adapted(alpha_pattern={"layers.0.self_attn.q_proj": 0}),
    "experts": lambda: with_experts(mixtral(), lora_alpha=0),
}


@pytest.mark.parametrize("make", NOTHING.values(), ids=NOTHING)
def test_a_scaling_of_0_is_refused_by_layer(make):
    with pytest.raises(lorainit.LoraInitError, match=r"layer '.*layers\.0\..*': the scaling of adapter 'default' is 0"):
        lorainit.find_sites(make())


def test_layers_on_the_meta_device_are_refused_by_name():
    with torch.device("meta"):
        base = LLAMA.make()
    model = get_peft_model(base, LLAMA.lora_config(), low_cpu_mem_usage=True)
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"layers\.0\.self_attn\.q_proj' is on the meta device"):
        lorainit.find_sites(model)


def net(**layers):
    with seeded():
        return Net(**layers)


UNSUPPORTED = {
    "embedding": (lambda: net(odd=nn.Embedding(8, 8)), {"target_modules": ["odd"]}, "embedding"),
    "experts": (lambda: net(odd=Experts()), {"target_modules": [], "target_parameters": ["odd.up"]}, "expert"),
    "grouped": (lambda: net(odd=nn.Conv2d(4, 4, 3, groups=2)), {"target_modules": ["odd"]}, r"groups=2"),
    "dilated": (lambda: net(odd=nn.Conv2d(4, 4, 3, dilation=(1, 2))), {"target_modules": ["odd"]}, r"\(1, 2\)"),
    "circular": (
        lambda: net(odd=nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")),
        {"target_modules": ["odd"]},
        r"circular",
    ),
    "attention": (lambda: net(odd=Attention()), {"target_modules": ["inner"]}, "MultiheadAttention"),
}


@pytest.mark.parametrize("make, config, reason", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_no_method_can_start_is_listed_with_the_reason(make, config, reason):
    model = get_peft_model(make(), LoraConfig(r=2, **config))
    _, unsupported = lorainit.find_sites(model)
    parts = ["odd.inner", "odd.inner.base_layer.out_proj"] if "odd.inner" in unsupported else ["odd"]
    assert list(unsupported) == parts
    assert all(re.search(reason, why) for why in unsupported.values())


@pytest.mark.parametrize(
    "since, variant",
    [
        ("0.20", lambda: {"init_lora_weights": "mica"}),
        ("0.21", lambda: {"kasa_config": peft.tuners.lora.config.KasaConfig()}),
    ],
    ids=["mica", "kasa"],
)
def test_variants_of_lora_with_another_forward_or_frozen_factors_are_not_taken_for_lora(since, variant):
    if Version(since) > PEFT:
        pytest.skip(f"came with PEFT {since}")
    sites, unsupported = lorainit.find_sites(LLAMA.adapted(**variant()))
    assert sites == []
    assert len(unsupported) == 6
    assert all(re.search(r"variant (MiCA|Kasa)LinearVariant", reason) for reason in unsupported.values())


def test_a_head_that_shares_its_factors_with_the_embedding_s_adapter_is_not_a_layer_of_its_own():
    model = TIED.adapted(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    sites, unsupported = lorainit.find_sites(model)
    assert [site.name.rpartition(".")[2] for site in sites] == ["q_proj", "q_proj"]
    assert "embedding" in unsupported["model.embed_tokens"]
    assert "ensure_weight_tying" in unsupported["lm_head"]
