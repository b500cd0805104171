"""Runs the benchmarks of ``lorainit evaluate`` on a table's adapters, beside their task's own metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from ..evaluation import alpaca_eval, gsm8k, mt_bench
from ..grids.parsing import parse

_BENCHMARKS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "mt-bench": (mt_bench.MTBench, mt_bench.run),
    "alpaca-eval": (alpaca_eval.AlpacaEval, alpaca_eval.run),
    "gsm8k": (gsm8k.GSM8K, gsm8k.run),
}


def check_evaluation(name: str, fields: Mapping[str, Any]) -> None:
    """Check a benchmark's options before anything is trained.

    Raises:
        LoraInitError: no such benchmark, or wrong options.
    """
    _options(name, fields, {"model": "model", "adapter": "adapter"}, Path("output"))


def evaluate(name: str, fields: Mapping[str, Any], model: Mapping[str, str], output: Path) -> dict[str, Any]:
    """Run a benchmark on what a run has trained.

    Args:
        name: of the benchmark, as ``lorainit evaluate`` calls it.
        fields: its options.
        model: the ``model`` that answers and, if there is one, its ``adapter``.
        output: folder of replies and verdicts; those that are there are not asked for again.

    Returns:
        ``metrics``, {"NAME METRIC": number, or None where there is none}; and ``kept``, the benchmark's own metrics and
        counts of replies and verdicts.

    Raises:
        LoraInitError: wrong options or data, a judge that is out of reach, or requests that got no reply.
    """
    result = _BENCHMARKS[name][1](_options(name, fields, model, output))
    metrics = {f"{name} {metric}": _number(value) for metric, value in result["metrics"].items()}
    missing = result["without_verdict"]
    if missing["unanswered"]:
        reason = next(iter(missing["reasons"].values()))
        raise LoraInitError(
            f"evaluations: {name}: {missing['unanswered']} requests got no reply, such as '{reason}'; what there is is "
            "kept, the same command goes on"
        )
    kept = {key: result[key] for key in ("metrics", "replies", "usage")} | {"unparsable": missing["unparsable"]}
    return {"metrics": metrics, "kept": kept}


def answering(model: str, trained: str, folder: Path) -> dict[str, str]:
    """Return the model and the adapter that a run has left in its folder.

    Args:
        model: the base model.
        trained: the recipe's ``adapter``; ``"none"`` for a run that trains all weights.
        folder: of the run.
    """
    return (
        {"model": str(folder / "model")} if trained == "none" else {"model": model, "adapter": str(folder / "adapter")}
    )


def _options(name: str, fields: Mapping[str, Any], model: Mapping[str, str], output: Path) -> Any:
    """Return the options of a benchmark, checked."""
    if name not in _BENCHMARKS:
        raise LoraInitError(f"evaluations: there is no '{name}', only {list(_BENCHMARKS)}")
    kind = _BENCHMARKS[name][0]
    own = [field for field in ("model", "adapter", "output") if field in fields]
    if own:
        raise LoraInitError(f"evaluations: {name}: {own} are the run's own")
    return parse(kind, {**fields, **model, "output": str(output)}, f"evaluations: {name}")


def _number(value: Any) -> float | None:
    """Return a metric as a number; None where the benchmark has only a reason why there is none."""
    value = value.get("value") if isinstance(value, dict) else value
    return None if isinstance(value, str) else value
