"""Better starting values for LoRA adapters, on top of Hugging Face PEFT.

report = lorainit.initialize(model, "loram")
...train as usual...
lorainit.save_pretrained(model, "out")      # one plain LoRA adapter for the original base
"""

from __future__ import annotations

from . import methods, offset
from .adapter.sites import LoraSite, find_sites
from .diagnostics.diagnose import diagnose
from .diagnostics.diagnosis import Diagnosis
from .diagnostics.layer import LayerDiagnosis
from .diagnostics.learning_rate import LrAdvice, suggest_lr
from .errors import LoraInitError, NonFiniteError, UnsupportedLayerError
from .methods import Factors, Method, MethodInfo, available, get_method, register
from .methods.abm import ABMLoRA
from .methods.ag_lora import AGLoRA
from .methods.auto import Auto
from .methods.cntlora import CNTLoRA
from .methods.corda import CorDA
from .methods.eva import EVA
from .methods.gaussian import Gaussian
from .methods.hrp import HRP
from .methods.init_ab import InitAB
from .methods.kaiming import Kaiming
from .methods.loftq import LoftQ
from .methods.lora_da import LoRADA
from .methods.lora_ga import LoRAGA
from .methods.lora_one import LoRAOne
from .methods.loram import LoRAM
from .methods.milora import MiLoRA
from .methods.olora import OLoRA
from .methods.orthogonal import Orthogonal
from .methods.pissa import PiSSA
from .methods.random import Random
from .report import InitReport, LayerReport
from .saving.checkpoint import export, load, merge, save_pretrained
from .start.budget import RankRule
from .start.initialize import initialize
from .version import __version__

__all__ = [
    "ABMLoRA",
    "AGLoRA",
    "Auto",
    "CNTLoRA",
    "CorDA",
    "Diagnosis",
    "EVA",
    "Factors",
    "Gaussian",
    "HRP",
    "InitAB",
    "InitReport",
    "Kaiming",
    "LayerDiagnosis",
    "LayerReport",
    "LoRADA",
    "LoRAGA",
    "LoRAM",
    "LoRAOne",
    "LoftQ",
    "LoraInitError",
    "LoraSite",
    "LrAdvice",
    "Method",
    "MethodInfo",
    "MiLoRA",
    "NonFiniteError",
    "OLoRA",
    "Orthogonal",
    "PiSSA",
    "Random",
    "RankRule",
    "UnsupportedLayerError",
    "__version__",
    "available",
    "diagnose",
    "export",
    "find_sites",
    "get_method",
    "initialize",
    "load",
    "merge",
    "methods",
    "offset",
    "register",
    "save_pretrained",
    "suggest_lr",
]
