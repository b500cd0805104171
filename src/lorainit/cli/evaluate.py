"""``lorainit evaluate``, and with ``mt-bench``, ``alpaca-eval`` or ``gsm8k``, which let the model write."""

from __future__ import annotations

import json
from typing import Any

from .command import Command, add_config


def evaluate(**options: Any) -> None:
    """Score a base model, with or without an adapter, on a task."""
    from ..train.evaluate import evaluate as run

    print(json.dumps(run(**options), indent=2))


def mt_bench(**options: Any) -> None:
    """Let the model answer MT-Bench's questions and a judge grade the answers."""
    from ..evaluation import mt_bench

    _show(mt_bench.run(mt_bench.MTBench(**options)), options["output"])


def alpaca_eval(**options: Any) -> None:
    """Let the model answer AlpacaEval's instructions and a judge compare the answers with a reference's."""
    from ..evaluation import alpaca_eval

    _show(alpaca_eval.run(alpaca_eval.AlpacaEval(**options)), options["output"])


def gsm8k(**options: Any) -> None:
    """Let the model solve GSM8K's problems and compare the numbers."""
    from ..evaluation import gsm8k

    _show(gsm8k.run(gsm8k.GSM8K(**options)), options["output"])


def _show(result: dict[str, Any], output: str) -> None:
    from ..evaluation.result import describe

    print(describe(result))
    print(f"saved to {output}: result.json, and a line for each reply and verdict")


def _add_options(parser: Any) -> None:
    from ..train.evaluate import evaluate as run

    add_config(parser)
    parser.add_function_arguments(run, as_group=False)


def _add_mt_bench(parser: Any) -> None:
    from ..evaluation.mt_bench import MTBench

    add_config(parser)
    parser.add_class_arguments(MTBench, as_group=False)


def _add_alpaca_eval(parser: Any) -> None:
    from ..evaluation.alpaca_eval import AlpacaEval

    add_config(parser)
    parser.add_class_arguments(AlpacaEval, as_group=False)


def _add_gsm8k(parser: Any) -> None:
    from ..evaluation.gsm8k import GSM8K

    add_config(parser)
    parser.add_class_arguments(GSM8K, as_group=False)


COMMAND = Command(evaluate, _add_options)
MT_BENCH = Command(mt_bench, _add_mt_bench)
ALPACA_EVAL = Command(alpaca_eval, _add_alpaca_eval)
GSM8K = Command(gsm8k, _add_gsm8k)
