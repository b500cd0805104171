"""What marks a started adapter in PEFT's own objects: a config and a model class that save and copy it rightly."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from ..adapter import offset
from ..adapter.sites import Owner, owners, pattern_name
from ..errors import LoraInitError
from ..report import InitReport
from .folder import (
    PROVENANCE_NAME,
    check_biases_are_saved,
    plain_fields,
    provenance,
    refitted_fields,
    write_json,
    written_rows,
)


class StartedLoraConfig(LoraConfig):
    """The `LoraConfig` of an adapter that lorainit started.

    It behaves as the config it replaces, except that what it *saves* is the plain adapter that the state dict holds:
    the ranks of the offset form and ``init_lora_weights: true``, with the provenance in ``lorainit.json`` beside it.
    PEFT makes other adapters from it too: another model's, or the result of ``add_weighted_adapter``. Their config gets
    the ranks of the tensors that they are saved with.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the plain adapter."""
        return super().to_dict() | self.__dict__.get("_plain", {})

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and, beside it, ``lorainit.json``.

        Raises:
            LoraInitError: the weights in the folder are damaged.
        """
        folder = Path(save_directory)
        # a PeftModel passes this, and has written the tensors; Transformers has not yet, and may find older ones there
        rows = written_rows(folder) if "auto_mapping_dict" in kwargs else {}
        if rows and rows != self.__dict__.get("_rows"):
            _of_another_adapter(self, rows).save_pretrained(str(folder), **kwargs)
            (folder / PROVENANCE_NAME).unlink(missing_ok=True)
            return
        super().save_pretrained(str(folder), **kwargs)
        if "_provenance" in self.__dict__:
            write_json(folder / PROVENANCE_NAME, self.__dict__["_provenance"])


def _of_another_adapter(config: StartedLoraConfig, rows: dict[str, int]) -> LoraConfig:
    """Return the config of an adapter that PEFT made from that of a started one."""
    other: Any = copy.copy(config)
    other.__class__ = LoraConfig
    other.__dict__.update(refitted_fields(other, rows))
    return other


class StartedLoraModel(LoraModel):
    """PEFT's model around an adapter in offset form; it makes no other adapter from that one's config.

    TRL makes its reference so, and PEFT's ``reduce_intruder_dimension`` its result: into a plain adapter they copy the
    parameters, which are not what an adapter in offset form adds.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does.

        Raises:
            LoraInitError: it has the very config of an adapter in offset form.
        """
        config = self.peft_config[adapter_name]
        shared = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        if shared and config.__dict__.get("_provenance", {}).get("offset_layers"):
            raise LoraInitError(
                f"adapter '{adapter_name}' cannot be made from the config of adapter '{shared[0]}', which lorainit "
                "started in offset form: a copy of its parameters, without the offset, is another function. In TRL, "
                "give the trainer the base and peft_config, then start trainer.model (DPO, KTO: or pass ref_model); "
                "for an adapter of its own, pass a LoraConfig of its own; to edit a copy of this one, load what "
                "lorainit.save_pretrained writes"
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)


def mark_started(model: nn.Module, adapter_name: str, report: InitReport) -> None:
    """Replace the adapter's config by one that saves what the adapter now is, and remembers where it came from.

    In every model that holds one, wherever it sits; bare layers without a config PEFT could not save either.

    Raises:
        LoraInitError: PEFT would leave trained biases out of what it saves.
    """
    found = owners(model, adapter_name)
    for owner in found:
        owner.configs[adapter_name] = _started(owner, adapter_name, report)
    if any(_in_offset_form(layer, adapter_name) for owner in found for _, _, layer in owner.layers):
        for tuner in model.modules():
            if type(tuner) is LoraModel:
                tuner.__class__ = StartedLoraModel


def _started(owner: Owner, adapter_name: str, report: InitReport) -> StartedLoraConfig:
    """Return the config of a started adapter, in one of the models that hold it."""
    config = owner.configs[adapter_name]
    check_biases_are_saved(config)
    offset_layers = [name for name, _, layer in owner.layers if _in_offset_form(layer, adapter_name)]
    ranks = {
        pattern_name(name, layer): (
            layer.r[adapter_name] * (2 if _in_offset_form(layer, adapter_name) else 1),
            float(layer.scaling[adapter_name]),
        )
        for name, _, layer in owner.layers
    }
    start = _report_of(owner, report).to_dict()
    started = copy.copy(config)
    started.__class__ = StartedLoraConfig
    started.__dict__["_plain"] = plain_fields(config, ranks)
    started.__dict__["_rows"] = {name: _saved_rows(layer, adapter_name) for name, _, layer in owner.layers}
    started.__dict__["_provenance"] = provenance(form="training", offset_layers=offset_layers, start=start)
    return started


def _report_of(owner: Owner, report: InitReport) -> InitReport:
    """Return what a report says of the layers of one model, by the names that they are saved with."""
    if not owner.prefix:
        return report
    own = (row for row in report.layers if row.name.startswith(owner.prefix))
    rows = (dataclasses.replace(row, name=row.name.removeprefix(owner.prefix)) for row in own)
    return dataclasses.replace(report, layers=tuple(rows))


def _in_offset_form(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A and offset.is_attached(layer.lora_A[adapter_name])


def _saved_rows(layer: LoraLayer, adapter_name: str) -> int:
    """Return how many rows A has in the state dict."""
    if adapter_name not in layer.lora_A:
        return layer.lora_embedding_A[adapter_name].shape[0]
    rows = offset.trained_factor(layer.lora_A[adapter_name]).shape[0]
    return 2 * rows if _in_offset_form(layer, adapter_name) else rows
