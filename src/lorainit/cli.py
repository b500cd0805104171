"""The command line: ``lorainit methods | init | train | table | diagnose | evaluate | bench | report | export``.

``lorainit evaluate mt-bench | alpaca-eval | gsm8k`` let the model write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from . import methods
from .errors import LoraInitError
from .version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; a wrong input is one line on standard error and status 1."""
    try:
        import jsonargparse
        import rich  # noqa: F401 - the commands print with it
    except ModuleNotFoundError as error:
        print(f"lorainit: {error}; the command line needs `pip install lorainit[train]`", file=sys.stderr)
        return 1
    try:
        function, options = _parse(sys.argv[1:] if arguments is None else arguments)
        function(**options)
    except jsonargparse.ArgumentError as error:
        print(f"lorainit: error: {' '.join(str(error).split())} (see lorainit --help)", file=sys.stderr)
        return 2
    except (LoraInitError, OSError) as error:
        print(f"lorainit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lorainit: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return the command's function and its options, nested ones as their dataclasses."""
    from jsonargparse import ArgumentParser

    name, commands = "lorainit", _COMMANDS
    # `evaluate` alone is a command too, with options of its own that the benchmarks do not share
    if arguments[:1] == ["evaluate"] and arguments[1:2] and arguments[1] in _BENCHMARKS:
        name, commands, arguments = "lorainit evaluate", _BENCHMARKS, arguments[1:]
    parser = ArgumentParser(prog=name, version=__version__, description=__doc__, exit_on_error=False)
    subcommands = parser.add_subcommands(title="commands")
    for command, (function, add) in commands.items():
        summary = (function.__doc__ or "").splitlines()[0]
        sub = ArgumentParser(description=summary, exit_on_error=False)
        add(sub)
        subcommands.add_subcommand(command, sub, help=summary)
    try:
        chosen: Any = parser.instantiate_classes(parser.parse_args(arguments))
    except ValueError as error:  # of a dataclass that refuses its options
        raise LoraInitError(str(error)) from error
    options = vars(chosen[chosen.subcommand])
    return commands[chosen.subcommand][0], {
        k: v for k, v in options.items() if k not in ("config", "__default_config__")
    }


def list_methods(json_output: bool = False) -> None:
    """List every method: what it needs, where it comes from, what it does to the start.

    Args:
        json_output: print JSON instead of a table.
    """
    found = methods.available()
    if json_output:
        print(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "needs", "BA", "start", "source", box=None, pad_edge=False)
    for info in found:
        name = info.name + (" [dim](reconstruction)[/dim]" if info.status == "reconstruction" else "")
        table.add_row(name, ", ".join(info.needs) or "nothing", info.product, info.summary, info.paper)
    Console().print(table)


def init(**recipe: Any) -> None:
    """Start a fresh adapter and save it; `lorainit train --start FOLDER` or `lorainit.load` train it from there."""
    from .train.recipe import Recipe
    from .train.run import start

    print(start(Recipe(**recipe)))
    print(f"saved to {recipe['output']}")


def train(**recipe: Any) -> None:
    """Train an adapter as a recipe says, evaluate it, save it plainly, write result.json."""
    from .train.recipe import Recipe
    from .train.run import train as run

    result = run(Recipe(**recipe))
    print(json.dumps(result["metrics"], indent=2))
    print(f"saved to {recipe['output']}: result.json, adapter/")


def table(
    file: str,
    scale: str = "paper",
    row: list[str] | None = None,
    column: list[str] | None = None,
    seeds: list[int] | None = None,
    rates: list[float] | None = None,
    data: str = "{data}",
    results: str = "runs/tables/results",
    scratch: str = "runs/tables/scratch",
    show: bool = False,
    redo: bool = False,
    write_recipe: str | None = None,
) -> None:
    """Repeat a published table: carry out its missing runs, print what was measured beside what was printed.

    Started twice with the same folders, two workers share the runs.

    Args:
        file: table file, such as recipes/tables/t5_glue.yaml.
        scale: "paper", or "small" for the same rows on small models and local data.
        row: only these rows.
        column: only these columns.
        seeds: instead of the table's.
        rates: learning rates instead of the table's.
        data: the folder that stands for {data} in the table file.
        results: folder for one JSON a run; what is there is not run again.
        scratch: folder for adapters that other rows need.
        show: run nothing, only print the table.
        redo: first remove the chosen runs' results that were made from another recipe than the table file's.
        write_recipe: run nothing, only write the chosen runs' recipes to this folder, for `lorainit train --config`.
    """
    from pathlib import Path

    from .tables.file import read_table
    from .tables.measured import Measured
    from .tables.page import page
    from .tables.place import Place
    from .tables.recipes import write_recipes
    from .tables.record import discard_changed
    from .tables.work import work

    if show + redo + (write_recipe is not None) > 1:
        raise LoraInitError("show, redo and write-recipe exclude each other")
    chosen = read_table(file, scale).selected(row, column, seeds, rates)
    place = Place(Path(results), Path(scratch), data)
    if write_recipe is not None:
        files, left = write_recipes(chosen, Path(write_recipe), data)
        for path in files:
            print(f"wrote {path}")
        for run in left:
            print(f"{run.name}: no recipe, only `lorainit table` carries out a control", file=sys.stderr)
        return
    if not show:
        chosen.check_data(data)  # before anything is removed or run
    if redo:
        for path in discard_changed(chosen, place):
            print(f"removed {path}, made from another recipe")
    if not show:
        work(chosen, place)
    print(page(chosen, place))
    left = Measured(chosen, place).hours()
    if left:
        print(f"missing: about {left:.1f} hours of one worker", file=sys.stderr)


def diagnose(**options: Any) -> None:
    """Tell what a start is worth: what it preserves, what it can follow, its first steps' size, its learning rate."""
    from .train.diagnose import DiagnosisOptions, diagnose_recipe
    from .train.recipe import Recipe

    fields = {field.name for field in dataclasses.fields(DiagnosisOptions)}
    as_json = options.pop("json_output")
    chosen = DiagnosisOptions(**{k: v for k, v in options.items() if k in fields})
    recipe = Recipe(**{k: v for k, v in options.items() if k not in fields})
    found, advice = diagnose_recipe(recipe, chosen)
    if as_json:
        print(json.dumps(found.to_dict() | {"advice": advice.to_dict() if advice else None}, indent=2))
        return
    print(found)
    if advice is not None:
        print(f"\n{advice}")
    print(f"saved to {recipe.output}: index.html, diagnosis.json, a PNG for each figure")


def evaluate(**options: Any) -> None:
    """Score a base model, with or without an adapter, on a task, or on mt-bench, alpaca-eval or gsm8k."""
    from .train.evaluate import evaluate as run

    print(json.dumps(run(**options), indent=2))


def bench(
    suite: str,
    output: str | None = None,
    root: str | None = None,
    address: str | None = None,
    retry_failed: bool = False,
) -> None:
    """Carry out what is missing of a suite of trials, on this machine or on a Ray cluster; call it again to go on.

    Args:
        suite: YAML file.
        output: folder of results; default: ``results/NAME``.
        root: folder that the suite's paths ``root:FOLDER`` lie below.
        address: of a Ray cluster; default: this machine alone.
        retry_failed: run failed trials again.
    """
    with _needs_bench():
        from .bench import load
        from .bench.run import bench as run

    chosen = load(suite)
    folder = output or f"results/{chosen.name}"
    options: Any = {"root": root, "address": address, "retry_failed": retry_failed}
    done = run(chosen, folder, tell=lambda line: print(line, flush=True), **options)
    told = ", ".join(f"{count} {status}" for status, count in sorted(done.carried_out.items())) or "nothing to do"
    print(f"{told} in {done.seconds:.0f} s; {done.found} results were there; `lorainit report {folder}` shows them")


def report(results: str, output: str | None = None, suite: str | None = None) -> None:
    """Write what a benchmark has found: one HTML page, and the tables as Markdown and CSV.

    Args:
        results: folder of results, as ``lorainit bench`` made it.
        output: folder for the page and the tables; default: the folder of results.
        suite: YAML file of the suite to report, where several share the folder; default: the one that was run last.
    """
    with _needs_bench():
        import jinja2  # noqa: F401
        import scipy  # noqa: F401

        from .bench.report import write_report

    print("\n".join(f"wrote {file}" for file in write_report(results, output or results, suite)))


@contextlib.contextmanager
def _needs_bench() -> Iterator[None]:
    """Say what to install where a library for benchmarks is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LoraInitError(f"{error}; benchmarks need `pip install lorainit[bench]`") from error


def mt_bench(**options: Any) -> None:
    """Let the model answer MT-Bench's questions and a judge grade the answers."""
    from .evaluation import mt_bench

    _show(mt_bench.run(mt_bench.MTBench(**options)), options["output"])


def alpaca_eval(**options: Any) -> None:
    """Let the model answer AlpacaEval's instructions and a judge compare the answers with a reference's."""
    from .evaluation import alpaca_eval

    _show(alpaca_eval.run(alpaca_eval.AlpacaEval(**options)), options["output"])


def gsm8k(**options: Any) -> None:
    """Let the model solve GSM8K's problems and compare the numbers."""
    from .evaluation import gsm8k

    _show(gsm8k.run(gsm8k.GSM8K(**options)), options["output"])


def _show(result: dict[str, Any], output: str) -> None:
    from .evaluation.result import describe

    print(describe(result))
    print(f"saved to {output}: result.json, and a line for each reply and verdict")


def export(source: str, output: str, rank: int | None = None, merge: bool = False, model: str | None = None) -> None:
    """Turn a checkpoint into a plain adapter, exact or truncated, or merge it into its base.

    Args:
        source: adapter folder, for example a Trainer checkpoint.
        output: folder to write.
        rank: truncate every layer's update to this rank.
        merge: write the merged model instead of an adapter.
        model: base for merging; default: the one the adapter names.
    """
    if merge and rank is not None:
        raise LoraInitError("rank and merge exclude each other: a merged model has no rank")
    if merge:
        from .train.merge import merge_folder

        merge_folder(source, output, model)
    else:
        from rich.console import Console
        from rich.table import Table

        from .saving import checkpoint

        errors = checkpoint.export(source, output, rank=rank)
        if rank is not None:
            table = Table("layer", "relative error", title=f"truncated to rank {rank}")
            for name, error in errors.items():
                table.add_row(name, f"{error:.2e}")
            Console().print(table)
    print(f"saved to {output}")


def _add_methods(parser: Any) -> None:
    parser.add_argument("--json", dest="json_output", action="store_true", help="print JSON instead of a table")


def _add_init(parser: Any) -> None:
    from .train.recipe import Recipe

    parser.add_argument("--config", action="config", help="recipe: a YAML file; later options override it")
    # the training's part of a recipe is read too, so that one file serves `init` and `train`
    parser.add_class_arguments(Recipe, as_group=False, skip={"start", "resume"})
    parser.set_defaults({"task": "text"})


def _add_train(parser: Any) -> None:
    from .train.recipe import Recipe

    parser.add_argument("--config", action="config", help="recipe: a YAML file; later options override it")
    parser.add_class_arguments(Recipe, as_group=False, skip={"resume"})
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")


def _add_table(parser: Any) -> None:
    parser.add_argument("file", type=str, help="table file, such as recipes/tables/t5_glue.yaml")
    for name, kind, what in (
        ("row", str, "only these rows"),
        ("column", str, "only these columns"),
        ("seeds", int, "instead of the table's"),
        ("rates", float, "learning rates instead of the table's"),
    ):
        parser.add_argument(f"--{name}", type=kind, nargs="+", help=what)
    own = {"file", "row", "column", "seeds", "rates", "show", "redo", "write_recipe"}
    parser.add_function_arguments(table, as_group=False, skip=own)
    parser.add_argument("--show", action="store_true", help="run nothing, only print the table")
    parser.add_argument(
        "--redo", action="store_true", help="first remove the results of another recipe than the table file's"
    )
    parser.add_argument(
        "--write-recipe",
        dest="write_recipe",
        metavar="FOLDER",
        type=str,
        help="run nothing, only write the runs' recipes there, for `lorainit train --config`",
    )


def _add_diagnose(parser: Any) -> None:
    from .train.diagnose import DiagnosisOptions
    from .train.recipe import Recipe

    parser.add_argument("--config", action="config", help="recipe: a YAML file; later options override it")
    parser.add_class_arguments(Recipe, as_group=False, skip={"resume"})
    parser.add_class_arguments(DiagnosisOptions, as_group=False)
    parser.add_argument("--json", dest="json_output", action="store_true", help="print JSON instead of a table")


def _add_evaluate(parser: Any) -> None:
    from .train.evaluate import evaluate as run

    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_function_arguments(run, as_group=False)


def _add_bench(parser: Any) -> None:
    parser.add_argument("suite", type=str, help="YAML file")
    parser.add_function_arguments(bench, as_group=False, skip={"suite", "retry_failed"})
    parser.add_argument("--retry-failed", dest="retry_failed", action="store_true", help="run failed trials again")


def _add_report(parser: Any) -> None:
    parser.add_argument("results", type=str, help="folder of results, as `lorainit bench` made it")
    parser.add_function_arguments(report, as_group=False, skip={"results"})


def _add_mt_bench(parser: Any) -> None:
    from .evaluation.mt_bench import MTBench

    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_class_arguments(MTBench, as_group=False)


def _add_alpaca_eval(parser: Any) -> None:
    from .evaluation.alpaca_eval import AlpacaEval

    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_class_arguments(AlpacaEval, as_group=False)


def _add_gsm8k(parser: Any) -> None:
    from .evaluation.gsm8k import GSM8K

    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_class_arguments(GSM8K, as_group=False)


def _add_export(parser: Any) -> None:
    parser.add_argument("source", type=str, help="adapter folder, for example a Trainer checkpoint")
    parser.add_function_arguments(export, as_group=False, skip={"source", "merge"})
    parser.add_argument("--merge", action="store_true", help="write the merged model instead of an adapter")


_COMMANDS: dict[str, tuple[Any, Any]] = {
    "methods": (list_methods, _add_methods),
    "init": (init, _add_init),
    "train": (train, _add_train),
    "table": (table, _add_table),
    "diagnose": (diagnose, _add_diagnose),
    "evaluate": (evaluate, _add_evaluate),
    "bench": (bench, _add_bench),
    "report": (report, _add_report),
    "export": (export, _add_export),
}

_BENCHMARKS: dict[str, tuple[Any, Any]] = {
    "mt-bench": (mt_bench, _add_mt_bench),
    "alpaca-eval": (alpaca_eval, _add_alpaca_eval),
    "gsm8k": (gsm8k, _add_gsm8k),
}

if __name__ == "__main__":
    sys.exit(main())
