"""What a table's adapters are asked beside their task's own metrics: the benchmarks of ``lorainit evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from ..evaluation import alpaca_eval, gsm8k, mt_bench

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
    """Let what a run has trained answer a benchmark.

    Args:
        name: of the benchmark, as ``lorainit evaluate`` calls it.
        fields: its options.
        model: the ``model`` that answers and, if there is one, its ``adapter``.
        output: folder of replies and verdicts; those that are there are not asked for again.

    Returns:
        ``metrics``, {"NAME METRIC": number, or None without one}; and ``told``, what else the benchmark says of its
        replies and verdicts.

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
    told = {key: result[key] for key in ("metrics", "replies", "usage")} | {"unparsable": missing["unparsable"]}
    return {"metrics": metrics, "told": told}


def answering(model: str, trained: str, folder: Path) -> dict[str, str]:
    """Return which model answers, with which adapter: what a run of a recipe with ``adapter=trained`` leaves there."""
    return (
        {"model": str(folder / "model")} if trained == "none" else {"model": model, "adapter": str(folder / "adapter")}
    )


def _options(name: str, fields: Mapping[str, Any], model: Mapping[str, str], output: Path) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    if name not in _BENCHMARKS:
        raise LoraInitError(f"evaluations: there is no '{name}', only {list(_BENCHMARKS)}")
    kind = _BENCHMARKS[name][0]
    own = [field for field in ("model", "adapter", "output") if field in fields]
    if own:
        raise LoraInitError(f"evaluations: {name}: {own} are the run's own")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    try:
        given: Any = parser.instantiate_classes(parser.parse_object({**fields, **model, "output": str(output)}))
    except ArgumentError as error:
        raise LoraInitError(f"evaluations: {name}: {' '.join(str(error).split())}") from error
    return kind(**vars(given))


def _number(value: Any) -> float | None:
    """Return a metric as a number: of a mean its value; None where there is only a reason why there is none."""
    value = value.get("value") if isinstance(value, dict) else value
    return None if isinstance(value, str) else value
