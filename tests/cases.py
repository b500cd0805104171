"""Tables of tiny models × layer kinds × dtypes that the tests are parametrized over, and what is asked of them."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lorainit
from lorainit.machine.sharding import local

PEFT, TRANSFORMERS = Version(peft.__version__), Version(transformers.__version__)
# fields of LoraConfig that came after the lowest PEFT that the package takes: what uses them is skipped before
SINCE = {"alora_invocation_tokens": "0.18", "ensure_weight_tying": "0.19", "kasa_config": "0.21"}

SEQUENCE, BATCH, VOCAB, CLASSES = 6, 3, 40, 5

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
METHODS = tuple(info.name for info in lorainit.available() if not info.needs)
DATA_DRIVEN = tuple(info.name for info in lorainit.available() if info.needs_data)
PRESERVING = tuple(i.name for i in lorainit.available() if i.product == "preserve" and not i.needs)


@contextlib.contextmanager
def seeded(seed: int = 0):
    """Draw from a fixed seed and leave the global generator where it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model and where LoRA goes in it; every call builds the same weights anew."""

    name: str
    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    example: Callable[[], dict[str, Tensor]]
    labels: Callable[[], Tensor]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with seeded():
            return self.make().to(dtype).eval()

    def lora_config(self, **config: Any) -> LoraConfig:
        # bias=False heads, dropout 0 unless asked: what differs from the base is then the adapter alone
        defaults = {"r": 4, "lora_alpha": 6, "target_modules": list(self.targets)}
        for field in SINCE.keys() & config.keys():
            if Version(SINCE[field]) > PEFT:
                pytest.skip(f"{field} came with PEFT {SINCE[field]}")
        return LoraConfig(**(defaults | self.config | config))

    def adapted(self, dtype: torch.dtype = torch.float32, *, autocast: bool = True, **config: Any) -> PeftModel:
        """The base with PEFT's freshly added adapter; ``autocast``: fp32 adapters on a half-precision base."""
        with seeded(1):
            base = self.base(dtype)
            return get_peft_model(base, self.lora_config(**config), autocast_adapter_dtype=autocast).eval()

    def batch(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        with seeded(2):
            example = self.example()
            return {k: v.to(dtype) if v.is_floating_point() else v for k, v in example.items()}

    def batches(self, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
        with seeded(3):
            return [self.batch(dtype) | {"labels": self.labels()}]


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(VOCAB, (BATCH, SEQUENCE))}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 8, 8)}


def _token_labels() -> Tensor:
    return torch.randint(VOCAB, (BATCH, SEQUENCE))


def _class_labels() -> Tensor:
    return torch.randint(CLASSES, (BATCH,))


def llama(**config: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "max_position_embeddings": 32,
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | heads | special | config)))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCAB, "n_positions": 16, "initializer_range": 0.3}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_dropout, **special))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    config = transformers.BertConfig(**sizes, **no_dropout, vocab_size=VOCAB, num_labels=CLASSES)
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4, "num_labels": CLASSES, "initializer_range": 0.3}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **image, **no_dropout))


class Net(nn.Module):
    """A stack of layers with the interface of a Transformers classifier."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> types.SimpleNamespace:
        x = pixel_values
        for layer in self.children():
            x = layer(x)
        loss = None if labels is None else nn.functional.cross_entropy(x.float(), labels)
        return types.SimpleNamespace(logits=x, loss=loss)


def convolutions() -> nn.Module:
    return Net(
        strided=nn.Conv2d(3, 8, 3, stride=2, padding=1),
        tanh=nn.Tanh(),
        pointwise=nn.Conv2d(8, 8, 1, bias=False),
        cube=nn.Unflatten(2, (2, 2)),
        volume=nn.Conv3d(8, 6, 2),
        line=nn.Flatten(2),
        sequence=nn.Conv1d(6, 8, 3, padding="same"),
        flat=nn.Flatten(),
        head=nn.Linear(24, CLASSES),
    )


class Twin(nn.Module):
    """Two branches in which the name of one layer is a suffix of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(2))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> types.SimpleNamespace:
        x = pixel_values[:, 0]
        for block in (*self.encoder.layers, *self.layers):
            x = torch.tanh(block["q"](x)) + block["v"](x)
        x = self.head(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(x.float(), labels)
        return types.SimpleNamespace(logits=x, loss=loss)


class Experts(nn.Module):
    """Two stacked weights on one module, as in a mixture of experts; PEFT wraps one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("b...i,eio->be...o", x, self.up)
        return torch.einsum("be...i,eio->b...o", torch.tanh(hidden), self.down)


class Attention(nn.Module):
    """A layer that PEFT adapts as a whole, with a linear layer inside that it adapts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_MOE = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCAB, "num_attention_heads": 2, "head_dim": 8}
_MOE |= {"num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "num_experts_per_tok": 2}
_MOE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def needs_stacks() -> None:
    """Skip the test where Transformers keeps every expert in a module of its own."""
    if Version("5.0") > TRANSFORMERS:
        pytest.skip("experts became one stack of weights with Transformers 5.0")


def mixtral(experts: int = 3) -> nn.Module:
    needs_stacks()
    config = transformers.MixtralConfig(**_MOE, intermediate_size=24, num_local_experts=experts)
    with seeded():
        return transformers.MixtralForCausalLM(config).eval()


def qwen_moe() -> nn.Module:
    needs_stacks()
    config = transformers.Qwen3MoeConfig(**_MOE, moe_intermediate_size=24, num_experts=4)
    with seeded():
        return transformers.Qwen3MoeForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    """Its experts have biases and are stored in×out."""
    needs_stacks()
    config = transformers.GptOssConfig(**_MOE, intermediate_size=24, num_local_experts=4)
    with seeded():
        return transformers.GptOssForCausalLM(config).eval()


def with_experts(base: nn.Module, **config: Any) -> PeftModel:
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": list(EXPERT_PARAMETERS)}
    with seeded(1):
        return get_peft_model(base, LoraConfig(**(options | config))).eval()


class Tokens(nn.Module):
    """Makes indices into a table of seven rows of anything."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.abs() * 4).long().clamp(max=6)


LLAMA = Case("llama", llama, ("q_proj", "v_proj", "down_proj"), _tokens, _token_labels)
TIED = Case("tied", lambda: llama(tie_word_embeddings=True), ("q_proj", "lm_head"), _tokens, _token_labels)
GPT2 = Case("gpt2", gpt2, ("c_attn", "c_fc"), _tokens, _token_labels, {"fan_in_fan_out": True})
CONV = Case("conv", convolutions, ("strided", "pointwise", "volume", "sequence", "head"), _pixels, _class_labels)
BERT = Case("bert", bert, ("query", "value"), _tokens, _class_labels)
# what Transformers 5 calls q_proj was "query" before
VIT = Case("vit", vit, ("q_proj", "query", "projection"), _pixels, _class_labels)
TWIN = Case("twin", Twin, ("q", "v"), _pixels, _class_labels)

# every kind of layer once; BERT, which has biases, and the twins serve tests of their own
CASES = (LLAMA, TIED, GPT2, CONV, VIT)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_method = pytest.mark.parametrize("method", METHODS)
each_preserving = pytest.mark.parametrize("method", PRESERVING)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def start(model: nn.Module, method: Any, **options: Any) -> lorainit.InitReport:
    return lorainit.initialize(model, method, progress=False, **options)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return model(**batch, **kwargs).logits


def train(model: nn.Module, batches: list[dict[str, Tensor]], steps: int = 3, optimizer: Any = None) -> None:
    """Train for a few steps that move both factors far enough to tell a right adapter from a wrong one."""
    mode = model.training
    model.train()
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    with seeded(4):
        for step in range(steps):
            model(**batches[step % len(batches)]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.train(mode)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that belongs to the base model: parameters and buffers."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in every if "lora_" not in name}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    changed = [name for name in expected if not torch.equal(actual[name].nan_to_num(7), expected[name].nan_to_num(7))]
    assert changed == []


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max())


def rng_state() -> tuple[Any, ...]:
    kind, keys, *position = np.random.get_state()  # noqa: NPY002
    return (tuple(torch.get_rng_state().tolist()), random.getstate(), (kind, tuple(keys.tolist()), *position))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All of a model that a failed call must leave as it was."""

    tensors: dict[str, Tensor]
    objects: dict[str, Any]
    rng: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
        objects: dict[str, Any] = {f"{name} (tensor)": (id(t), t.requires_grad, t.grad is None) for name, t in every}
        for name, module in model.named_modules():
            objects[name] = (type(module), module.training, *(tuple(getattr(module, hook)) for hook in hooks))
        for name, config in getattr(model, "peft_config", {}).items():
            objects[f"config of {name}"] = (id(config), type(config), config.to_dict())
        return cls({name: local(tensor.detach()).clone() for name, tensor in every}, objects, rng_state())

    def assert_unchanged(self, model: nn.Module, *, buffers_remade: bool = False) -> None:
        now = Snapshot.of(model)
        assert_same_tensors(now.tensors, self.tensors)
        assert now.objects.keys() == self.objects.keys()
        # a restored offset is a new buffer that holds the old values
        differing = [k for k in self.objects if now.objects[k] != self.objects[k]]
        assert [k for k in differing if not (buffers_remade and k.endswith(".offset (tensor)"))] == []
        assert now.rng == self.rng


@dataclasses.dataclass(frozen=True)
class Scripted(lorainit.Method):
    """A toy method: starts layers like LoRAM would, and does ``action`` at the ``at``-th one."""

    action: Callable[[lorainit.LoraSite], lorainit.Factors]
    at: int = 0
    seen: list[str] = dataclasses.field(default_factory=list)

    info = lorainit.MethodInfo(name="scripted", summary="for tests", paper="none", product="preserve")

    def start(self, site: lorainit.LoraSite, generator: torch.Generator, *statistics: Any) -> lorainit.Factors:
        self.seen.append(site.name)
        if len(self.seen) == self.at + 1:
            return self.action(site)
        A = torch.randn(site.rank, site.in_features, generator=generator)
        return lorainit.Factors(A, torch.randn(site.out_features, site.rank, generator=generator))
