"""Better starting values for LoRA adapters, on top of Hugging Face PEFT.

report = lorainit.initialize(model, "loram")
...train as usual...
lorainit.save_pretrained(model, "out")      # one plain LoRA adapter for the original base
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers read; tests/test_package.py holds it against what `__getattr__` finds
    from . import methods as methods
    from . import offset as offset
    from .adapter.sites import LoraSite as LoraSite
    from .adapter.sites import find_sites as find_sites
    from .catalog import MethodInfo as MethodInfo
    from .diagnostics.diagnose import diagnose as diagnose
    from .diagnostics.diagnosis import Diagnosis as Diagnosis
    from .diagnostics.layer import LayerDiagnosis as LayerDiagnosis
    from .diagnostics.learning_rate import LrAdvice as LrAdvice
    from .diagnostics.learning_rate import suggest_lr as suggest_lr
    from .errors import LoraInitError as LoraInitError
    from .errors import NonFiniteError as NonFiniteError
    from .errors import UnsupportedLayerError as UnsupportedLayerError
    from .methods import Factors as Factors
    from .methods import Method as Method
    from .methods import available as available
    from .methods import get_method as get_method
    from .methods import register as register
    from .methods.abm import ABMLoRA as ABMLoRA
    from .methods.ag_lora import AGLoRA as AGLoRA
    from .methods.auto import Auto as Auto
    from .methods.cntlora import CNTLoRA as CNTLoRA
    from .methods.corda import CorDA as CorDA
    from .methods.eva import EVA as EVA
    from .methods.gaussian import Gaussian as Gaussian
    from .methods.hrp import HRP as HRP
    from .methods.init_ab import InitAB as InitAB
    from .methods.kaiming import Kaiming as Kaiming
    from .methods.loftq import LoftQ as LoftQ
    from .methods.lora_da import LoRADA as LoRADA
    from .methods.lora_ga import LoRAGA as LoRAGA
    from .methods.lora_one import LoRAOne as LoRAOne
    from .methods.loram import LoRAM as LoRAM
    from .methods.milora import MiLoRA as MiLoRA
    from .methods.olora import OLoRA as OLoRA
    from .methods.orthogonal import Orthogonal as Orthogonal
    from .methods.pissa import PiSSA as PiSSA
    from .methods.random import Random as Random
    from .report import InitReport as InitReport
    from .report import LayerReport as LayerReport
    from .saving.checkpoint import export as export
    from .saving.checkpoint import load as load
    from .saving.checkpoint import merge as merge
    from .saving.checkpoint import save_pretrained as save_pretrained
    from .start.budget import RankRule as RankRule
    from .start.initialize import initialize as initialize
else:
    # Names are imported when they are first asked for: `lorainit --help` does not wait for torch. The classes of the
    # methods are looked up in the registry, so that a new method needs no line here to be found.
    _HOMES = {
        "adapter.sites": ("LoraSite", "find_sites"),
        "catalog": ("MethodInfo",),
        "diagnostics.diagnose": ("diagnose",),
        "diagnostics.diagnosis": ("Diagnosis",),
        "diagnostics.layer": ("LayerDiagnosis",),
        "diagnostics.learning_rate": ("LrAdvice", "suggest_lr"),
        "errors": ("LoraInitError", "NonFiniteError", "UnsupportedLayerError"),
        "methods": ("Factors", "Method", "available", "get_method", "register"),
        "report": ("InitReport", "LayerReport"),
        "saving.checkpoint": ("export", "load", "merge", "save_pretrained"),
        "start.budget": ("RankRule",),
        "start.initialize": ("initialize",),
        "version": ("__version__",),
    }
    _HOME = {name: module for module, names in _HOMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        """Import a name of the package, or one of its modules."""
        if name == "__all__":
            return __dir__()
        found = _find(name)
        if found is None:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """Return the public names."""
        from .methods.registry import builtin

        return sorted({*_HOME, *builtin(), "methods", "offset"})

    def _find(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        if name[:1].isupper():
            from .methods.registry import builtin

            return builtin().get(name)
        is_module = not name.startswith("_") and importlib.util.find_spec(f".{name}", __name__) is not None
        return importlib.import_module(f".{name}", __name__) if is_module else None
