"""LoRA layers as the methods see them: a name, a weight as out×in, a rank, a scaling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._typing import Float, Tensor
from ..errors import LoraInitError, NonFiniteError, UnsupportedLayerError
from ..machine import sharding
from ..numerics.linalg import frobenius_norm, product_norm
from . import offset
from .quantized import dequantized, is_quantized, misread_by_peft

_PEFT_PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_KINDS = ("linear", "conv1d", "conv")
# PEFT's variants of LoRA that apply B and A as plain LoRA does; the others put something between them or freeze one
_PLAIN_VARIANTS = ("Dora", "ALora")
# values of init_lora_weights for which PEFT edits the base weight
_BASE_EDITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class LoraSite:
    """One LoRA layer that a method can start.

    Attributes:
        name: module path in the model (without PEFT's ``base_model.model.`` in front), as in the saved adapter's keys;
            where PEFT's model is inside another one, the path from the outer one.
        layer: the PEFT layer.
        adapter: name of the adapter on that layer.
        kind: ``"linear"``, ``"conv1d"`` (GPT-2's transposed linear), ``"conv"`` (Conv1d/2d/3d) or ``"experts"`` (see
            `lorainit.adapter.experts`).
    """

    name: str
    layer: LoraLayer
    adapter: str
    kind: str
    _whole: list[Tensor] = dataclasses.field(default_factory=list, repr=False, compare=False)

    @property
    def is_sharded(self) -> bool:
        """Whether the base weight is spread over several processes."""
        return sharding.is_spread(getattr(self.base_layer, "weight", None))

    def put_together(self, *, keep: bool) -> None:
        """Gather a sharded weight, in all processes at once; those that keep it can read it until `drop_whole`."""
        if self.is_sharded:
            weight = sharding.gathered(self.base_layer.get_parameter("weight"))
            self._whole[:] = [weight] if keep else []

    def drop_whole(self) -> None:
        """Free what `put_together` has gathered."""
        self._whole.clear()

    @property
    def base_layer(self) -> nn.Module:
        """The wrapped layer of the base model."""
        return self.layer.get_base_layer()

    @property
    def lora_A(self) -> nn.Module:
        """PEFT's down-projection module of this adapter."""
        return self.layer.lora_A[self.adapter]

    @property
    def lora_B(self) -> nn.Module:
        """PEFT's up-projection module of this adapter."""
        return self.layer.lora_B[self.adapter]

    @property
    def rank(self) -> int:
        """Rank r of the adapter on this layer."""
        return self.layer.r[self.adapter]

    @property
    def scaling(self) -> float:
        """PEFT's multiplier s of BA: alpha/r, or alpha/√r with rsLoRA."""
        return float(self.layer.scaling[self.adapter])

    @property
    def members(self) -> Sequence[LoraSite]:
        """What gets a start of its own: the layer; of expert parameters, every expert."""
        return [self]

    @property
    def is_routed(self) -> bool:
        """Whether it sees the tokens that a router sends it, instead of every position."""
        return False

    @property
    def experts(self) -> int:
        """How many weights the adapter is on: more than one only for expert parameters."""
        return self.layer.num_experts if isinstance(self.layer, ParamWrapper) else 1

    @property
    def out_features(self) -> int:
        """Rows of the weight as out×in."""
        return trained_shape(self.lora_B)[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight as out×in; for a convolution, channels × kernel positions."""
        return trained_shape(self.lora_A)[1]

    @property
    def device(self) -> torch.device:
        """Device of the adapter's factors."""
        return offset.trained_factor(self.lora_A).device

    def stored_weight(self) -> Float[Tensor, "out in"]:
        """Return the base weight as out×in in the dtype it is stored in: a view, unless it has to be dequantized."""
        base = self.base_layer
        if is_quantized(base):
            try:
                return dequantized(base)
            except ValueError as error:
                raise UnsupportedLayerError(f"layer '{self.name}': {error}") from error
        if self.is_sharded and not self._whole:
            raise LoraInitError(f"layer '{self.name}': its weight is sharded and is not put together here")
        weight = self._whole[0] if self._whole else base.weight.detach()  # pyright: ignore[reportCallIssue]
        if self.kind == "conv1d":
            return weight.T
        return weight.flatten(1) if self.kind == "conv" else weight

    def weight(self) -> Float[Tensor, "out in"]:
        """Return the base weight as out×in in at least float32 (float64 stays): a view where nothing is converted."""
        stored = self.stored_weight()
        return stored if stored.dtype == torch.float64 else stored.float()

    @cached_property
    def weight_norm(self) -> float:
        """Frobenius norm of the weight, from one read of it (see `lorainit.numerics.linalg.frobenius_norm`).

        Raises:
            NonFiniteError: the weight holds NaN or infinity.
        """
        norm = frobenius_norm(self.stored_weight())
        if not math.isfinite(norm):
            raise NonFiniteError(f"layer '{self.name}': the base weight holds NaN or infinite entries")
        return norm

    def factors(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """Return the present trainable factors (A, B) as matrices, detached views; put together if they are sharded."""
        a, b = (sharding.whole(offset.trained_factor(m).detach()) for m in (self.lora_A, self.lora_B))
        return a.flatten(1), b.flatten(1)

    def update_norm(self) -> float:
        """Return the Frobenius norm of s·BA."""
        return self.scaling * product_norm(*self.factors())


class _OnCpu(LoraSite):
    """A site that is computed in CPU memory, wherever its layer is."""

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def stored_weight(self) -> Float[Tensor, "out in"]:
        """Return the base weight as out×in, copied to the CPU if it is not there."""
        return super().stored_weight().cpu()


def on_cpu(site: LoraSite) -> LoraSite:
    """Return a site that methods work on in CPU memory."""
    return _OnCpu(**{field.name: getattr(site, field.name) for field in dataclasses.fields(site)})


def trained_shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of a factor's trained parameter, kernel positions counted as inputs."""
    shape = offset.trained_factor(module).shape
    return shape[0], shape[1:].numel()


def site_name(module_name: str) -> str:
    """Strip PEFT's wrapper prefix, and those of compiled modules, from a module path."""
    return module_name.replace(_COMPILED, "").removeprefix(_PEFT_PREFIX)


def pattern_name(name: str, layer: LoraLayer) -> str:
    """Return the name that PEFT matches ``rank_pattern`` against: the layer's, or that of the adapted parameter."""
    if isinstance(layer, ParamWrapper):
        return f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
    return name


def adapter_config(model: nn.Module, adapter_name: str) -> LoraConfig | None:
    """Return the config of an adapter that the model itself holds; None where it holds none, as bare layers do."""
    configs = getattr(model, "peft_config", None)
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    return config if isinstance(config, LoraConfig) else None


class Owner(NamedTuple):
    """A model that PEFT has put an adapter into, and that holds its config; it may be a part of another model.

    Attributes:
        prefix: what its layers' names begin with in the whole model, beyond those that they are saved with.
        configs: by adapter name.
        layers: of the adapter: the name that it is saved with, the path in the whole model, and the layer.
    """

    prefix: str
    configs: dict[str, Any]
    layers: list[tuple[str, str, LoraLayer]]


def config_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Yield every module in a model that holds configs of adapters, with its path and these configs, outer ones first.

    PEFT's wrappers and the model that they wrap hold the very same dictionary.
    """
    for path, module in model.named_modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and all(isinstance(config, PeftConfig) for config in configs.values()):
            yield path, module, configs


def owners(model: nn.Module, adapter_name: str) -> list[Owner]:
    """Return what holds the config of a LoRA adapter, wherever it sits in a model, outer models first."""
    # of those with the same configs the innermost: layers are saved under their paths in it
    innermost = {id(configs): (path, module, configs) for path, module, configs in config_holders(model)}
    paths = {id(layer): site_name(path) for path, layer in _with_adapter(model, adapter_name)}
    found: list[Owner] = []
    for path, module, configs in innermost.values():
        layers = _with_adapter(module, adapter_name)
        if layers and isinstance(configs.get(adapter_name), LoraConfig):
            named = [(below.replace(_COMPILED, ""), paths[id(layer)], layer) for below, layer in layers]
            found.append(Owner(site_name(f"{path}." if path else ""), configs, named))
    return found


def owning(model: nn.Module, adapter_name: str) -> nn.Module:
    """Return what in a model can save an adapter: the model itself, or the one part of it that holds its config.

    Raises:
        LoraInitError: several parts have an adapter of that name.
    """
    first: dict[int, tuple[str, nn.Module]] = {}
    for path, module, configs in config_holders(model):
        # a compiled module shows the configs of the one inside, but names its tensors otherwise
        if adapter_name in configs and "_orig_mod" not in module._modules:
            first.setdefault(id(configs), (path.replace("_orig_mod", "").strip("."), module))
    outermost = next(iter(first.values()), ("", model))
    if outermost[0] and len(first) > 1:
        raise LoraInitError(
            f"{type(model).__name__} holds several models with an adapter '{adapter_name}' "
            f"({', '.join(repr(path) for path, _ in first.values())}): pass one of them"
        )
    return outermost[1]


def _with_adapter(model: nn.Module, adapter_name: str) -> list[tuple[str, LoraLayer]]:
    """Return the path and the layer of every LoRA layer that carries an adapter, in module order."""
    every = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    return [(path, m) for path, m in every if adapter_name in m.lora_A or adapter_name in m.lora_embedding_A]


def base_editing_init(config: object) -> str | None:
    """Return the ``init_lora_weights`` of an adapter's config if PEFT has edited the base weights for it, else None."""
    init = getattr(config, "init_lora_weights", True)
    return init if isinstance(init, str) and init.lower().startswith(_BASE_EDITING) else None


def lora_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, LoraLayer]]:
    """Return (name, layer) of every PEFT LoRA layer of ``model`` that carries ``adapter_name``, in module order.

    Raises:
        LoraInitError: no LoRA layer at all, or none with that adapter (the message lists the adapters there are).
    """
    if chosen := _with_adapter(model, adapter_name):
        return [(site_name(path), layer) for path, layer in chosen]
    every = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not every:
        raise LoraInitError(
            f"{type(model).__name__} has no PEFT LoRA layers{_other_adapters(model)}; wrap it with peft.get_peft_model("
            "model, LoraConfig(...)) or add an adapter with model.add_adapter(LoraConfig(...)) first"
        )
    present = sorted({adapter for layer in every for adapter in (*layer.lora_A, *layer.lora_embedding_A)})
    raise LoraInitError(f"no LoRA layer carries the adapter '{adapter_name}'; adapters on this model: {present}")


def _other_adapters(model: nn.Module) -> str:
    """Return, for a message, which adapters a model has that are no LoRA."""
    kinds = {
        name: getattr(config.peft_type, "value", config.peft_type)
        for _, _, configs in config_holders(model)
        for name, config in configs.items()
    }
    if not kinds:
        return ""
    listed = ", ".join(f"'{name}' is {kind}" for name, kind in kinds.items())
    return f" (its adapter {listed}, and lorainit starts LoRA alone)"


def find_sites(model: nn.Module, adapter_name: str = "default") -> tuple[list[LoraSite], dict[str, str]]:
    """Find the layers of an adapter that can be started.

    Returns:
        The sites in module order, and {layer name: reason} for the layers that no method can start (embeddings, 3-D
        expert parameters, grouped or dilated convolutions, variants of LoRA, unknown layer types).

    Raises:
        LoraInitError: no LoRA, an unknown adapter, an adapter that is merged into any layer of the model, a PEFT model
            inside another one, or a layer whose scaling is 0.
        UnsupportedLayerError: a layer whose factors or weight are not all here: on the meta device, offloaded, or split
            in another way than FSDP2's; or factors that ZeRO-3 partitions.
    """
    sites: list[LoraSite] = []
    unsupported: dict[str, str] = {}
    wrapped = sharding.wrapping(model)
    layers = lora_layers(model, adapter_name)
    check_unmerged(model)
    _check_not_nested(model, adapter_name)
    of_attention = _attention_outputs(model)
    of_embeddings = _embedding_storages(layers, adapter_name)
    for name, layer in layers:
        if layer.scaling[adapter_name] == 0:
            raise LoraInitError(
                f"layer '{name}': the scaling of adapter '{adapter_name}' is 0 (lora_alpha=0): it would never change "
                "anything"
            )
        kind = of_attention.get(id(layer)) or _kind(layer, adapter_name, of_embeddings)
        if kind not in _KINDS:
            unsupported[name] = kind
            continue
        site = LoraSite(name, layer, adapter_name, kind)
        weight = getattr(site.base_layer, "weight", None)
        for values in (weight, offset.trained_factor(site.lora_A)):
            if reason := sharding.obstacle(values, site.base_layer, wrapped):
                raise UnsupportedLayerError(f"layer '{name}' {reason}")
        if sharding.is_partitioned(offset.trained_factor(site.lora_A)):
            raise UnsupportedLayerError(
                f"layer '{name}' has factors that are partitioned by DeepSpeed ZeRO-3, whose optimizer may hold copies "
                "of them; start the adapter before deepspeed.initialize (before Trainer.train)"
            )
        sites.append(site)
    return sites, unsupported


def check_unmerged(model: nn.Module, but: str | None = None) -> None:
    """Raise if an adapter, other than ``but``, is merged into any layer, with the adapter in question or without.

    PEFT unmerges it, not to the last bit, when the base alone runs; and it would be in what another is merged into.
    """
    for name, layer in model.named_modules():
        merged = layer.merged_adapters if isinstance(layer, BaseTunerLayer) else []
        for adapter in merged:
            if adapter != but:
                raise LoraInitError(
                    f"layer '{site_name(name)}': adapter '{adapter}' is merged into the base; unmerge it first"
                )


def _check_not_nested(model: nn.Module, adapter_name: str) -> None:
    """Raise if a layer with the adapter is in a PEFT model inside another: it is saved by a name that nothing loads."""
    wrappers = [path for path, module in model.named_modules() if isinstance(module, (PeftModel, PeftMixedModel))]
    for path, _ in _with_adapter(model, adapter_name):
        around = [wrapper for wrapper in wrappers if not wrapper or path.startswith(f"{wrapper}.")]
        if len(around) > 1:
            raise LoraInitError(
                f"layer '{site_name(path)}' is in a PeftModel ('{around[-1]}') inside a PeftModel, and what PEFT saves "
                "of that, PEFT does not load; for a second adapter use model.add_adapter(name, config) of the inner "
                "one, or take its adapter off first (unload, merge_and_unload)"
            )


def _attention_outputs(model: nn.Module) -> dict[int, str]:
    """Return why the output layers of `torch.nn.MultiheadAttention` cannot be started, by the layer's id."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            found[id(module.get_base_layer().out_proj)] = (
                "PEFT gives it the rank and the scaling of the MultiheadAttention around it, which cannot be started"
            )
        elif isinstance(module, nn.MultiheadAttention):
            reason = "MultiheadAttention takes its weight without running it, so that PEFT's adapter has no effect"
            found.setdefault(id(module.out_proj), reason)
    return found


def _storage(tensor: Tensor) -> int:
    return sharding.local(tensor).untyped_storage().data_ptr()


def _embedding_storages(layers: list[tuple[str, LoraLayer]], adapter: str) -> set[int]:
    """Return where the factors of embedding layers lie in memory; tensors without values (meta) lie at 0."""
    pairs = [(layer.lora_embedding_A, layer.lora_embedding_B) for _, layer in layers]
    return {_storage(factor[adapter]) for pair in pairs for factor in pair if adapter in factor} - {0}


def _kind(layer: LoraLayer, adapter: str, of_embeddings: set[int]) -> str:
    """Return the site kind, or the reason why there is none."""
    base = layer.get_base_layer()
    variant = type(layer.lora_variant.get(adapter)).__name__
    if isinstance(layer, ParamWrapper):
        kind = "expert parameters (target_parameters): see lorainit.adapter.experts"
    elif adapter in layer.lora_embedding_A:
        kind = "embedding layers are not supported"
    elif adapter in layer.lora_variant and not variant.startswith(_PLAIN_VARIANTS):
        kind = f"the LoRA variant {variant} is not supported"
    elif variant.startswith("Dora") and misread_by_peft(base):
        kind = "DoRA on bitsandbytes weights on the CPU is not supported: PEFT's forward pass misreads these weights"
    elif not (offset.can_attach(layer.lora_A[adapter]) and offset.can_attach(layer.lora_B[adapter])):
        kind = f"factors of type {type(layer.lora_A[adapter]).__name__} are not supported"
    elif _storage(offset.trained_factor(layer.lora_A[adapter])) in of_embeddings:
        kind = "factors shared with the adapter of the embedding (ensure_weight_tying) are not supported"
    elif isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        kind = _convolution_kind(base)
    elif isinstance(base, (Conv1D, nn.Linear)) or is_quantized(base):
        # fan_in_fan_out: the weight is stored transposed, as in GPT-2's Conv1D
        kind = "conv1d" if isinstance(base, Conv1D) or getattr(layer, "fan_in_fan_out", False) else "linear"
    else:
        kind = f"layers of type {type(base).__name__} are not supported"
    return kind


def _convolution_kind(base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    if base.groups > 1:
        return f"grouped convolutions (groups={base.groups}) are not supported"
    if any(d != 1 for d in base.dilation):
        return f"dilated convolutions (dilation={tuple(base.dilation)}) are not supported: PEFT's lora_A ignores it"
    if base.padding_mode != "zeros":
        return f"convolutions with padding_mode={base.padding_mode!r} are not supported: PEFT's lora_A ignores it"
    return "conv"
