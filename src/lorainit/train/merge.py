"""Merges a saved adapter into its base: one plain model, of the class that the adapter was made for."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig

from ..errors import LoraInitError
from ..saving import checkpoint
from ..saving.folder import PREFIX
from .model import loading, resolve_model

# PEFT's task types
_BY_TASK_TYPE = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
# what follows a layer's name in the key of one of the adapter's own tensors
_OF_ADAPTER = re.compile(r"\.(lora_|base_layer\.|token_adapter\.).*")


def merge_folder(source: str, output: str, model: str | None = None) -> None:
    """Merge a saved adapter into its base and save the plain model with its tokenizer or processor.

    The class of the model is the first of these that has all layers of the adapter: the one that the adapter's config
    names (``auto_mapping``), the one of its task type, those that the base's config names, the model without a head.

    Args:
        source: adapter folder.
        output: folder to write.
        model: the base; default: the one that the adapter names.

    Raises:
        LoraInitError: no base is known or loadable, no class has the adapter's layers, or they cannot be merged.
    """
    config, tensors = checkpoint.read_adapter(source)
    name = model or config.base_model_name_or_path
    if not name:
        raise LoraInitError(f"{source} does not name its base model; pass --model")
    path = resolve_model(name)
    network = _load_base(name, path, _Adapter(source, config, tensors))
    try:
        adapted = PeftModel.from_pretrained(network, source)
    except (RuntimeError, ValueError) as error:
        raise LoraInitError(f"{source} does not fit the base '{name}': {error}") from error
    merged: Any = checkpoint.merge(adapted)
    merged.save_pretrained(output)
    _save_processor(name, path, output)


class _Adapter:
    """A saved adapter.

    Args:
        source: its folder.
        config: PEFT's.
        tensors: all that is saved.
    """

    def __init__(self, source: str, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
        self.source, self.config = source, config
        names = [key.removeprefix(PREFIX) for key in tensors]
        # modules that were trained in full, such as a head
        self.full = {
            name: tensor for name, tensor in zip(names, tensors.values(), strict=True) if not _OF_ADAPTER.search(name)
        }
        self.layers = dict.fromkeys(
            name.rpartition(".")[0] if name in self.full else _OF_ADAPTER.sub("", name) for name in names
        )

    def resized(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of modules trained in full whose shape is another one in a model."""
        own = network.state_dict()
        return {name: tensor for name, tensor in self.full.items() if name in own and own[name].shape != tensor.shape}

    def misfit(self, network: nn.Module) -> str | None:
        """Return why the adapter is not for a model; None if it has all layers and heads in the same shapes."""
        modules = dict(network.named_modules(remove_duplicate=False))
        absent = [layer for layer in self.layers if layer not in modules]
        if absent:
            return f"has no layer '{absent[0]}'"
        other = [f"'{name}' of another shape than {tuple(t.shape)}" for name, t in self.resized(network).items()]
        return f"has {other[0]}" if other else None


def _load_base(name: str, path: str, adapter: _Adapter) -> Any:
    """Load the base as a model of the class that the adapter was made for."""
    with loading(name):
        config = AutoConfig.from_pretrained(path)
    model_class, fitted = _choose(name, config, adapter)
    with loading(name):
        return model_class.from_pretrained(
            path,
            config=fitted,
            dtype=torch.float32,
            ignore_mismatched_sizes=fitted is not config,  # a head for other classes makes room for the adapter's
        )


def _choose(name: str, config: PretrainedConfig, adapter: _Adapter) -> tuple[Any, PretrainedConfig]:
    """Return the model class that the adapter was made for, and the config with as many classes as its head has.

    Raises:
        LoraInitError: no class that the adapter or the base names has the adapter's layers.
    """
    reasons = []
    for model_class in _candidates(adapter.config, config):
        try:
            network, fitted = _with_head_of(adapter, model_class, config)
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            reasons.append(f"{model_class.__name__} cannot be made: {_first_line(error)}")
            continue
        reason = adapter.misfit(network)
        if reason is None:
            return model_class, fitted
        reasons.append(f"{type(network).__name__} {reason}")
    raise LoraInitError(
        f"{adapter.source}: it cannot be told which model class of '{name}' the adapter is for (task_type "
        f"{adapter.config.task_type}, auto_mapping {adapter.config.auto_mapping}, the base's architectures "
        f"{config.architectures}): {'; '.join(dict.fromkeys(reasons))}"
    )


def _with_head_of(adapter: _Adapter, model_class: Any, config: PretrainedConfig) -> tuple[nn.Module, PretrainedConfig]:
    """Return a model without weights, with as many classes as the adapter's head if it has one, and its config."""
    network = _without_weights(model_class, config)
    rows = {tensor.shape[0] for tensor in adapter.resized(network).values()}
    if len(rows) != 1:
        return network, config
    config = copy.deepcopy(config)
    config.num_labels = rows.pop()
    return _without_weights(model_class, config), config


def _candidates(adapter: LoraConfig, base: PretrainedConfig) -> Iterator[Any]:
    """Yield the model classes that the two configs name, the most certain first."""
    mapped: dict[str, str] = adapter.auto_mapping or {}
    # a class of another library is not looked up: a file would decide which code is run
    of_transformers = mapped.get("parent_library", "").partition(".")[0] == "transformers"
    named = [mapped["base_model_class"]] if of_transformers else []
    found = [getattr(transformers, name, None) for name in named]
    found.append(_BY_TASK_TYPE.get(str(adapter.task_type)))
    found.extend(getattr(transformers, name, None) for name in base.architectures or ())
    found.append(transformers.AutoModel)
    yield from dict.fromkeys(model_class for model_class in found if hasattr(model_class, "from_pretrained"))


def _without_weights(model_class: Any, config: PretrainedConfig) -> nn.Module:
    """Return a model of a class, with the shapes of its weights and no values."""
    with init_empty_weights():
        return model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)


def _save_processor(name: str, path: str, output: str) -> None:
    """Save the base's tokenizer or processor with the merged model; warn if it has none."""
    reason = ""
    for kind in (AutoProcessor, AutoTokenizer):
        try:
            processor = kind.from_pretrained(path)
        except Exception as error:  # where its files are absent, each class fails in its own way
            reason = reason or _first_line(error)
        else:
            processor.save_pretrained(output)
            return
    warnings.warn(f"model '{name}': no tokenizer or processor goes with the merged model: {reason}", stacklevel=3)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
