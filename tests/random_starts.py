"""Random configurations of model, adapter and start, and what has to hold after each: the start, or a clear refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import cases
import lorainit
from lorainit.adapter.quantized import dequantized, is_quantized

METHODS = tuple(info.name for info in lorainit.available())
QUANTIZED = ("nf4", "nf4-double", "int8", "torchao-int8", "torchao-int4")
# start methods whose BA = 0 only up to rounding
ROUNDED = ("orthogonal",)


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": cases.VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    chosen = {"num_local_experts": 3, "num_experts_per_tok": 2, "initializer_range": 0.3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, **chosen))


EXPERTS = cases.Case(
    "experts",
    mixtral,
    ("q_proj",),
    cases._tokens,
    cases._token_labels,
    {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
)
EMBEDDED = dataclasses.replace(cases.LLAMA, name="embedding", targets=("embed_tokens", "q_proj", "up_proj"))
MODELS = {
    case.name: case
    for case in (cases.LLAMA, cases.TIED, cases.GPT2, cases.CONV, cases.BERT, cases.VIT, EXPERTS, EMBEDDED)
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One random start."""

    model: str = "llama"
    quantized: str | None = None
    dtype: str = "fp32"
    method: str = "pissa"
    rank: int = 2
    alpha: float = 4
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    pattern: bool = False
    bias: bool = False
    base: str = "auto"
    ranks: str = "fixed"
    match_lr: bool = False
    on_unsupported: str = "default"
    autocast: bool = True
    train_mode: bool = False
    second_adapter: bool = False
    checkpointing: bool = False
    seed: int = 0


def draw(rng: random.Random) -> Configuration:
    """Draw a configuration; plain values are the frequent ones."""

    def mostly(usual: Any, *others: Any, chance: float = 0.2) -> Any:
        return rng.choice(others) if rng.random() < chance else usual

    quantized = mostly(None, *QUANTIZED)
    return possible(
        Configuration(
            model="full" if quantized else rng.choice(list(MODELS)),
            quantized=quantized,
            dtype="fp32" if quantized else mostly("fp32", "bf16", "fp16", "fp64", chance=0.5),
            method=rng.choice(METHODS),
            rank=rng.choice((1, 2, 2, 3, 4, 4, 6, 8, 16, 40)),
            alpha=rng.choice((1, 2, 4, 16, 0.5)),
            rslora=mostly(False, True),
            dora=mostly(False, True),
            dropout=mostly(0.0, 0.1),
            pattern=mostly(False, True),
            bias=mostly(False, True, chance=0.1),
            base=mostly("auto", "offset", "keep", "subtract", chance=0.4),
            ranks=mostly("fixed", "budget", "energy", "cost"),
            match_lr=mostly(False, True),
            on_unsupported=mostly("default", "error", chance=0.4),
            autocast=mostly(True, False),
            train_mode=mostly(False, True),
            second_adapter=mostly(False, True),
            checkpointing=mostly(False, True),
            seed=rng.randrange(100),
        )
    )


def possible(c: Configuration) -> Configuration:
    """Switch off what PEFT or torch refuse by themselves: that is not ours to test."""
    if c.model == "experts":  # grouped products know no float64
        c = dataclasses.replace(c, dora=False, bias=False, dropout=0.0, dtype=c.dtype.replace("fp64", "fp32"))
    if c.dora or c.model == "embedding" or (c.quantized or "").startswith("torchao"):
        c = dataclasses.replace(c, bias=False)
    if c.quantized in ("nf4", "nf4-double", "int8"):  # PEFT's DoRA breaks these layers on the CPU by itself
        c = dataclasses.replace(c, dora=False)
    return c


@functools.cache
def _full() -> Path:
    from quantization import save_full

    return save_full(Path(tempfile.mkdtemp()) / "full")


def case_of(c: Configuration) -> cases.Case:
    if c.quantized:
        from quantization import FULL

        return FULL
    return MODELS[c.model]


def make(c: Configuration, **changed: Any) -> PeftModel:
    """Build the model and its adapter."""
    case = case_of(c)
    options: dict[str, Any] = {"r": c.rank, "lora_alpha": c.alpha, "use_rslora": c.rslora, "use_dora": c.dora}
    options |= {"lora_dropout": c.dropout, "lora_bias": c.bias}
    if c.pattern:
        options["rank_pattern"] = {case.targets[0]: max(1, c.rank // 2)}
    if c.quantized:
        from quantization import quantized_base

        base = quantized_base(c.quantized, _full())
        with cases.seeded(1):
            model = get_peft_model(base, case.lora_config(**options))
    else:
        model = case.adapted(cases.DTYPES[c.dtype], autocast=c.autocast, **options)
    if c.second_adapter:
        with cases.seeded(6):
            model.add_adapter("other", LoraConfig(**(case.lora_config().to_dict() | {"r": 2})))
        model.set_adapter("default")
    if c.checkpointing and hasattr(model, "gradient_checkpointing_enable") and hasattr(model, "config"):
        with contextlib.suppress(ValueError, AttributeError):
            model.gradient_checkpointing_enable()
    return model.train(c.train_mode)


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that belongs to the base, scales of quantized weights included."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if is_quantized(module) and not hasattr(module, "base_layer"):
            found[f"{name}.weight"] = dequantized(module).clone()
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in own}
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return the flags, the hooks and which parameters train."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (module.training, *(tuple(getattr(module, hook)) for hook in hooks))
    found |= {f"{name} (trains)": p.requires_grad for name, p in model.named_parameters()}
    found |= {f"{name} (grad)": p.grad is None for name, p in model.named_parameters()}
    return found | {"rng": cases.rng_state(), "default dtype": torch.get_default_dtype()}


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in every if "lora_" in name}


def output(model: nn.Module, c: Configuration) -> Tensor:
    """Return what the model computes in eval mode, flags left alone."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    found = cases.logits(model, case_of(c).batch(cases.DTYPES[c.dtype]))
    for module, mode in modes:
        module.training = mode
    return found


def check(c: Configuration) -> str:
    """Run a configuration and assert what has to hold; return ``"started"``, or the refusal.

    Raises:
        AssertionError: a silent wrong start, a base that was changed, something left behind.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(c)
        case = case_of(c)
        layers = lorainit.adapter.sites.lora_layers(model, "default")
        before = output(model, c)
        with model.disable_adapter():
            bare = output(model, c)
        data = case.batches(cases.DTYPES[c.dtype])
        base, state, adapters = base_of(model), state_of(model), adapters_of(model)
        method: Any = c.method
        if method == "loftq" and c.quantized:
            method = lorainit.LoftQ(weights=_full())
        options: dict[str, Any] = {"base": c.base, "ranks": c.ranks, "match_lr": c.match_lr, "seed": c.seed}
        try:
            report = lorainit.initialize(
                model, method, data=data, on_unsupported=c.on_unsupported, progress=False, **options
            )
        except lorainit.LoraInitError as refusal:
            cases.assert_same_tensors(base_of(model), base)
            cases.assert_same_tensors(adapters_of(model), adapters)
            assert state_of(model) == state, "a refused start left something behind"
            return str(refusal)
        _check_started(model, c, report, layers, base, state)
        _check_function(model, c, report, before, bare)
    return "started"


def _check_started(
    model: Any, c: Configuration, report: Any, layers: Any, base: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Assert that base, flags and hooks are as before, and that the report has a row a layer."""
    assert [row.name for row in report.layers] == [name for name, _ in layers]
    now = state_of(model)
    # a layer that lost its rank to others is no longer there
    gone = {key for key in state.keys() - now.keys() if c.ranks != "fixed"}
    differing = [key for key in state if key not in gone and now.get(key) != state[key]]
    assert differing == [], differing[:3]
    if c.base != "subtract":
        after = base_of(model)
        # a wrapper around a layer that lost its adapter is gone from the names
        plain = {name.replace("base_layer.", ""): tensor for name, tensor in base.items()}
        cases.assert_same_tensors({n.replace("base_layer.", ""): t for n, t in after.items()}, plain)


def _check_function(model: Any, c: Configuration, report: Any, before: Tensor, bare: Tensor) -> None:
    """Assert that the function at step 0 is what the rows of the report say, and the adapter without it the base."""
    after = output(model, c)
    assert bool(after.isfinite().all()) or not bool(before.isfinite().all()), "NaN at step 0"
    if c.base != "subtract":
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        with model.disable_adapter():
            assert torch.equal(output(model, c), bare), "disable_adapter() does not give the base back"
        for module, mode in modes:
            module.training = mode
    if not bool(before.isfinite().all()):
        return  # PEFT's DoRA divides by the zero row of a padding token: NaN before as after, and the report says so
    if any(row.base == "keep" for row in report.layers):
        if c.dtype in ("fp32", "fp64") and not c.quantized and c.model != "tied" and c.base != "subtract":
            merged = _merged(model, c)
            moved = cases.relative_difference(after, merged)
            assert moved <= 1e-3, f"a kept start is not W + s·BA: {moved:.2g}"
        return
    exact = c.method not in ROUNDED and not c.dora and c.base != "subtract"
    if exact:
        assert torch.equal(after, before), f"step 0 moved by {cases.relative_difference(after, before):.2g}"
    elif c.dtype in ("fp32", "fp64") and c.quantized is None:
        moved = cases.relative_difference(after, before)
        assert moved <= 1e-4, f"step 0 moved by {moved:.2g}"


def _merged(model: Any, c: Configuration) -> Tensor:
    """Return what a fresh base computes with s·BA of every layer added to its weights."""
    base = case_of(c).base(cases.DTYPES[c.dtype])
    with torch.no_grad():
        for name, layer in lorainit.adapter.sites.lora_layers(model, "default"):
            owner = base.get_submodule(name.replace(".base_layer", ""))
            owner.get_parameter(getattr(layer, "parameter_name", "weight")).add_(layer.get_delta_weight("default"))
    if c.bias:
        for name, layer in lorainit.adapter.sites.lora_layers(model, "default"):
            assert not bool(layer.lora_B["default"].bias.any()), name
    return output(base, c)


def check_saved(c: Configuration) -> None:
    """Assert that what is saved after the start and a disturbance is one plain adapter with the same function.

    Raises:
        AssertionError: it is not.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        model = make(c).eval()
        data = case_of(c).batches(cases.DTYPES[c.dtype])
        options: dict[str, Any] = {"base": c.base, "ranks": c.ranks, "match_lr": c.match_lr, "seed": c.seed}
        try:
            lorainit.initialize(model, c.method, data=data, on_unsupported="default", progress=False, **options)
        except lorainit.LoraInitError:
            return
        with torch.no_grad(), cases.seeded(7):
            for name, parameter in model.named_parameters():
                if "lora_B" in name and ".default" in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        lorainit.save_pretrained(model, folder)
        fresh = PeftModel.from_pretrained(case_of(c).base(cases.DTYPES[c.dtype]), folder).eval()
        expected = output(model, c)
        difference = cases.relative_difference(output(fresh, c), expected)
        assert difference <= 1e-3 or not bool(expected.isfinite().all()), (
            f"the saved adapter differs by {difference:.2g}"
        )
