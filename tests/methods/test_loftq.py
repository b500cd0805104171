"""LoftQ: the best low-rank part of the quantization error, against PEFT's own and the paper's alternation."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoftQConfig, get_peft_model, replace_lora_weights_loftq
from peft.utils.loftq_utils import loftq_init
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import cases
import lorainit
from lorainit import LoftQ, LoraInitError
from lorainit.adapter.quantized import dequantized
from lorainit.adapter.unquantized import original_weight
from lorainit.methods import loftq
from matrices import decaying
from quantization import FULL, each_kind, quantized_base, save_full

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return save_full(tmp_path_factory.mktemp("full"))


def adapted(kind, folder, **config):
    with cases.seeded(1):
        return get_peft_model(quantized_base(kind, folder), FULL.lora_config(**config)).eval()


class OnCpu(TorchFunctionMode):
    """PEFT's LoftQ asks for an accelerator by name; its arithmetic is the same on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {k: "cpu" if k == "device" and str(v) == "cuda" else v for k, v in (kwargs or {}).items()}
        args = tuple("cpu" if isinstance(a, (str, torch.device)) and str(a) == "cuda" else a for a in args)
        return func(*args, **kwargs)


def weight_errors(model, original):
    """|W − Q − sBA| of every adapted layer."""
    return {
        site.name: float(
            (original[f"{site.name}.weight"] - site.weight() - site.layer.get_delta_weight("default").float()).norm()
        )
        for site in lorainit.find_sites(model)[0]
    }


def nf4(matrix):
    import bitsandbytes

    quantized = bitsandbytes.functional.quantize_4bit(matrix.contiguous(), quant_type="nf4", blocksize=64)
    return bitsandbytes.functional.dequantize_4bit(*quantized)


# --- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [1.0, 0.5, 2.0])
def test_the_factors_are_the_best_part_of_the_error(scaling):
    error = decaying(20, 12, 0.5)
    A, B = loftq.factors(error, 3, scaling)
    values = torch.linalg.svdvals(error)
    assert float((error - scaling * B @ A).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-10)
    torch.testing.assert_close(A @ A.mT, B.mT @ B, rtol=1e-9, atol=1e-12)


def test_a_randomized_svd_is_nearly_as_good():
    error = decaying(60, 40, 0.5)
    left = [
        float((error - B @ A).norm()) for A, B in (loftq.factors(error, 4, 1.0, exact=exact) for exact in (True, False))
    ]
    assert left[0] <= left[1] <= 1.01 * left[0]


@pytest.mark.parametrize("iterations", [1, 5])
def test_alternation_is_as_near_to_the_weight_as_peft_s(iterations):
    with cases.seeded():
        weight = torch.randn(64, 128)
    (A, B), quantized = loftq.alternate(weight, nf4, 8, 2.0, iterations=iterations)
    with OnCpu():
        peft_quantized, peft_A, peft_B = loftq_init(weight, num_bits=4, reduced_rank=8, num_iter=iterations)
    theirs = float((weight - peft_quantized - peft_B @ peft_A).norm())
    ours = float((weight - quantized - 2.0 * B @ A).norm())
    assert ours <= theirs * (1 + 1e-5)
    torch.testing.assert_close(quantized, peft_quantized, rtol=1e-3, atol=1e-3)


def test_alternation_is_better_than_one_step():
    with cases.seeded():
        weight = torch.randn(64, 128)
    left = []
    for iterations in (1, 5):
        (A, B), quantized = loftq.alternate(weight, nf4, 8, 1.0, iterations=iterations)
        left.append(float((weight - quantized - B @ A).norm()))
    assert left[1] < left[0]
    with pytest.raises(ValueError, match="iterations must be ≥ 1"):
        loftq.alternate(weight, nf4, 8, 1.0, iterations=0)


# --- on a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_inference", [False, True])
def test_a_4_bit_model_comes_at_least_as_near_to_the_original_as_with_peft_s(after_inference, full):
    original = load_file(full / "model.safetensors")
    ours, theirs = (adapted("nf4", full, r=8, lora_alpha=8) for _ in range(2))
    with OnCpu():
        replace_lora_weights_loftq(theirs, str(full))
    before = weight_errors(ours, original)
    if after_inference:
        cases.logits(ours, FULL.batch())
    report = cases.start(ours, LoftQ(weights=full))
    assert [row.base for row in report.layers] == ["keep"] * 3
    expected, found = weight_errors(theirs, original), weight_errors(ours, original)
    # inference on a CPU with AVX512-BF16 rounds the scales, which the start then makes up for as well
    slack = 1e-3 if after_inference else 1e-5
    for name, error in found.items():
        assert error <= expected[name] * (1 + slack) + 1e-6
        assert error < 0.9 * before[name]


@each_kind
def test_every_kind_of_quantized_model_moves_towards_the_original(kind, full):
    original = load_file(full / "model.safetensors")
    expected = cases.logits(FULL.base(), FULL.batch())
    model = adapted(kind, full, r=32, lora_alpha=32, target_modules="all-linear")
    weights, function = weight_errors(model, original), cases.logits(model, FULL.batch())
    cases.start(model, LoftQ(weights=original))
    for name, error in weight_errors(model, original).items():
        assert error < 0.9 * weights[name]
    moved = cases.logits(model, FULL.batch())
    assert float((moved - expected).norm()) < 0.9 * float((function - expected).norm())


def test_as_an_option_of_peft_s_config_loftq_edits_the_base_and_is_refused(full):
    with OnCpu():
        config = FULL.lora_config(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=1))
        model = get_peft_model(FULL.base(), config)
    with pytest.raises(LoraInitError, match="init_lora_weights='loftq', which has edited the base"):
        cases.start(model, "pissa")


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("nf4", LoftQ(), "set its option weights"),
        ("nf4", LoftQ(weights="/nowhere"), "/nowhere holds no .safetensors file"),
        (None, LoftQ(weights={}), r"layer 'model.layers.0.self_attn.q_proj' is not quantized"),
        ("nf4", LoftQ(weights={}), r"q_proj': its original weight .* is not in the given weights: nothing like it"),
    ],
    ids=["no weights", "no folder", "not quantized", "no such name"],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(kind, method, message, full):
    base = FULL.base() if kind is None else quantized_base(kind, full)
    model = get_peft_model(base, FULL.lora_config()).eval()
    snapshot = cases.Snapshot.of(model)
    with pytest.raises(LoraInitError, match=message):
        cases.start(model, method)
    snapshot.assert_unchanged(model)


def test_weights_of_another_model_are_noticed(full):
    model = adapted("nf4", full)
    other = {name: torch.randn_like(value) for name, value in load_file(full / "model.safetensors").items()}
    with pytest.raises(LoraInitError, match="was not made from the given one"):
        cases.start(model, LoftQ(weights=other))
    with pytest.raises(LoraInitError, match=r"has shape \(3,\), the quantized one \(64, 64\)"):
        cases.start(model, LoftQ(weights={"model.layers.0.self_attn.q_proj.weight": torch.ones(3)}))


def test_a_transposed_original_is_the_right_way_round():
    weight = torch.eye(8) + torch.triu(torch.ones(8, 8))
    torch.testing.assert_close(loftq._error(weight.mT.contiguous(), weight + 0.01, "x"), torch.full((8, 8), -0.01))


def test_options_are_checked_and_stand_in_the_report(full):
    with pytest.raises(LoraInitError, match="iterations must be ≥ 0"):
        lorainit.get_method("loftq", iterations=-1)
    report = cases.start(adapted("nf4", full), LoftQ(weights=full, exact=False))
    assert json.loads(json.dumps(report.to_dict()))["options"] == {
        "weights": str(full),
        "exact": False,
        "iterations": 3,
    }
    options = cases.start(adapted("nf4", full), LoftQ(weights=load_file(full / "model.safetensors"))).options
    assert options["weights"] == "dict"


# --- where the original weights are -----------------------------------------------------------------------------------


def test_a_sharded_checkpoint_a_file_and_other_prefixes_are_read(tmp_path):
    tensors = {f"model.layers.{i}.q.weight": torch.full((2, 2), float(i)) for i in range(2)}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"model-{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}}))
    for layer in ("model.layers.1.q", "layers.1.q", "wrapper.model.layers.1.q"):
        assert torch.equal(original_weight(tmp_path, layer), tensors["model.layers.1.q.weight"])
    assert torch.equal(original_weight(tmp_path / "model-0.safetensors", "layers.0.q"), torch.zeros(2, 2))
    with pytest.raises(LoraInitError, match="fit"):
        original_weight(tensors, "q")
    index.write_text(json.dumps({"weight_map": {"model.layers.0.q.weight": "../model-0.safetensors"}}))
    with pytest.raises(LoraInitError, match="points out of its folder"):
        original_weight(tmp_path, "model.layers.0.q")
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(LoraInitError, match="cannot be read"):
            original_weight(tmp_path, "model.layers.0.q")
    index.unlink()
    with pytest.raises(LoraInitError, match="several .safetensors files"):
        original_weight(tmp_path, "model.layers.0.q")
    (tmp_path / "model-1.safetensors").unlink()
    (tmp_path / "model-0.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(LoraInitError, match="cannot be read"):
        original_weight(tmp_path, "model.layers.0.q")


def test_the_dequantized_weight_of_the_model_is_the_pure_function_s(full):
    model = quantized_base("nf4", full)
    weight = load_file(full / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(dequantized(model.get_submodule("model.layers.0.self_attn.q_proj")), nf4(weight))
