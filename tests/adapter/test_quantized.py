"""Quantized bases: every method starts them, exactly, and what is saved is for the quantized and the full base."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import cases
import lorainit
from lorainit.adapter.quantized import dequantized, is_quantized, unpacked
from quantization import FULL, KINDS, each_kind, quantized_base, save_full

PRESERVES = {info.name: info.product != "step" for info in lorainit.available()}
METHODS = (*cases.METHODS, *cases.DATA_DRIVEN)
TRAINED = ("hrp", "abm")  # up to a second each
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*get_apply_tensor_subclass")


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    return save_full(tmp_path_factory.mktemp("full"))


def adapted(kind, folder, **config):
    with cases.seeded(1):
        return get_peft_model(quantized_base(kind, folder), FULL.lora_config(**config)).eval()


def layer(model) -> nn.Module:
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").get_base_layer()


def state_of(model):
    """Everything that a quantized layer consists of, the objects and their values."""
    found = {}
    for name, module in model.named_modules():
        if is_quantized(module) and not hasattr(module, "base_layer"):
            weight = module.weight
            state = getattr(weight, "quant_state", None) or getattr(module, "state", None)
            numbers = {k: v for k, v in vars(state).items() if isinstance(v, torch.Tensor)} if state else {}
            numbers.pop("idx", None)  # which columns of the latest input were outliers
            values = weight.dequantize() if type(weight).__module__.startswith("torchao.") else weight.data
            tensors = {"weight": values, **numbers}
            found[name] = (weight, state, {k: (v, v.clone()) for k, v in tensors.items()})
    return found


def assert_same_state(model, before):
    now = state_of(model)
    assert now.keys() == before.keys()
    for name, (weight, state, tensors) in before.items():
        assert now[name][0] is weight and now[name][1] is state
        assert now[name][2].keys() == tensors.keys()
        for key, (_, copied) in tensors.items():
            assert torch.equal(now[name][2][key][0], copied), (name, key)


# --- reading a weight -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after inference"])
@each_kind
def test_the_dequantized_weight_is_what_the_layer_multiplies_by_and_the_layer_is_not_touched(kind, ran, full):
    model = quantized_base(kind, full)
    if ran:
        cases.logits(model, FULL.batch())
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    before = state_of(model)
    weight = dequantized(linear)
    assert_same_state(model, before)
    original = FULL.base().get_submodule("model.layers.0.self_attn.q_proj").get_parameter("weight").detach()
    assert float((weight - original).norm() / original.norm()) < (0.02 if "int8" in kind else 0.2)
    with torch.no_grad():
        applied = linear(torch.eye(64)).mT
    # 8 bit: the layer rounds its input as well; repacked 4 bit: it multiplies in bfloat16
    assert cases.relative_difference(applied, weight.float()) < 1e-2


def test_a_weight_that_is_not_quantized_yet_is_refused_by_layer():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = cases.Net(linear=bitsandbytes.nn.Linear4bit(64, 64))
    model = get_peft_model(net, cases.LoraConfig(r=2, target_modules=["linear"]))
    with pytest.raises(lorainit.UnsupportedLayerError, match="layer 'linear': its 4-bit weight has not been quantized"):
        cases.start(model, "pissa")


def test_8_bit_scales_that_peft_has_lost_are_missed():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")
    assert dequantized(linear).shape == (64, 64)
    linear.weight.SCB = None
    with pytest.raises(ValueError, match="lost its scales"):
        dequantized(linear)


def test_subclasses_of_the_known_layers_are_quantized_layers_too():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert is_quantized(bitsandbytes.nn.LinearNF4(64, 64))
    assert not is_quantized(nn.Linear(4, 4))
    assert not is_quantized(nn.Embedding(4, 4))


def test_inside_differentiable_gradients_pass_a_layer_that_inference_has_repacked_and_it_is_put_back(full):
    model = quantized_base("nf4-double", full)
    cases.logits(model, FULL.batch())
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    before = state_of(model)
    weight = dequantized(linear)
    x = torch.randn(3, 128, requires_grad=True)
    with unpacked(model):
        linear(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert_same_state(model, before)


# --- starting ---------------------------------------------------------------------------------------------------------


def _cost(kind, method):
    fast = kind == "nf4-double" or (method not in TRAINED and (kind == "int8" or method in cases.METHODS))
    return pytest.param(kind, method, marks=() if fast else pytest.mark.slow, id=f"{kind}-{method}")


@pytest.mark.parametrize("kind, method", [_cost(kind, method) for kind in KINDS[1:] for method in METHODS])
def test_a_start_leaves_the_quantized_base_and_is_saved_for_it_and_for_the_full_one(kind, method, full, tmp_path):
    model = adapted(kind, full, r=2, lora_alpha=2)
    data = FULL.batches()
    before = cases.logits(model, FULL.batch())
    state = state_of(model)
    report = cases.start(model, method, data=data)
    assert_same_state(model, state)
    assert len(report.layers) == len(FULL.targets)
    after = cases.logits(model, FULL.batch())
    if method == "orthogonal":
        assert cases.relative_difference(after, before) < 1e-5
    elif PRESERVES[method]:
        assert torch.equal(after, before)
    else:
        assert not torch.equal(after, before)

    with torch.no_grad():  # as after some training
        for site in lorainit.find_sites(model)[0]:
            for factor in (site.lora_A, site.lora_B):
                lorainit.offset.trained_factor(factor).add_(0.05)
    lorainit.save_pretrained(model, tmp_path)
    assert_same_state(model, state)
    trained = cases.logits(model, FULL.batch())
    for base, exact in ((quantized_base(kind, full), True), (FULL.base(), False)):
        fresh = PeftModel.from_pretrained(base, tmp_path).eval()
        if exact:
            assert cases.relative_difference(cases.logits(fresh, FULL.batch()), trained) < 1e-4
        for site in lorainit.find_sites(fresh)[0]:
            live = model.get_submodule(f"base_model.model.{site.name}").get_delta_weight("default")
            assert cases.relative_difference(site.layer.get_delta_weight("default"), live) < 1e-5


@pytest.mark.parametrize("method", ["pissa", "corda", "lora-ga", "lora-da"])
@pytest.mark.parametrize("kind", ["nf4-double", "torchao-int8"])
def test_the_start_is_that_of_the_dequantized_model_also_after_inference(kind, method, full):
    model = adapted(kind, full)
    cases.logits(model, FULL.batch())
    plain = get_peft_model(FULL.base(), FULL.lora_config()).eval()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if type(module) is nn.Linear and "lora_" not in name and "lm_head" not in name:
                module.weight.copy_(dequantized(model.get_submodule(name)))
    for each in (model, plain):
        cases.start(each, method, data=FULL.batches())
    expected = {site.name: site for site in lorainit.find_sites(plain)[0]}
    for site in lorainit.find_sites(model)[0]:
        A, B = site.factors()
        A0, B0 = expected[site.name].factors()
        assert cases.relative_difference(B @ A, B0 @ A0) < 1e-3


@each_kind
def test_subtracting_from_a_quantized_weight_is_refused_and_changes_nothing(kind, full):
    model = adapted(kind, full)
    state = state_of(model)
    with pytest.raises(lorainit.UnsupportedLayerError, match=r"q_proj': base='subtract' cannot edit a Linear"):
        cases.start(model, "pissa", base="subtract")
    assert_same_state(model, state)


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "torchao-int8"])
def test_training_a_started_adapter_moves_the_function_and_not_the_base(kind, full):
    model = adapted(kind, full)
    cases.start(model, "pissa")
    state = {name: {k: v for k, (_, v) in t.items()}["weight"] for name, (_, _, t) in state_of(model).items()}
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            loss = model(**FULL.batches()[0]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    for name, (_, _, tensors) in state_of(model).items():
        assert torch.equal(tensors["weight"][0], state[name])


@pytest.mark.parametrize("kind", ["nf4-double", "torchao-int8"])
def test_statistics_of_a_quantized_model_are_cached_and_known_again(kind, full, tmp_path):
    first, second = adapted(kind, full), adapted(kind, full)
    cases.start(first, "corda", data=FULL.batches(), cache=tmp_path)
    report = cases.start(second, "corda", data=FULL.batches(), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert report.details["statistics"]
    for a, b in zip(lorainit.find_sites(first)[0], lorainit.find_sites(second)[0], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.factors(), b.factors(), strict=True))


def test_a_copied_quantized_model_starts_alike(full):
    model = adapted("nf4-double", full)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        cases.start(each, "pissa")
    for a, b in zip(lorainit.find_sites(model)[0], lorainit.find_sites(twin)[0], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.factors(), b.factors(), strict=True))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_dora_is_a_no_op_or_refused_where_peft_misreads_the_weight(kind, full):
    model = adapted(kind, full, use_dora=True)
    if kind.startswith("torchao"):
        before = cases.logits(model, FULL.batch())
        cases.start(model, "pissa")
        assert cases.relative_difference(cases.logits(model, FULL.batch()), before) < 1e-5
        return
    with pytest.raises(lorainit.UnsupportedLayerError, match="q_proj': DoRA on bitsandbytes weights on the CPU"):
        cases.start(model, "pissa")
