"""``lorainit bench`` and ``lorainit report``."""

from __future__ import annotations

from typing import Any

from .command import Command


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
    from ..bench import load
    from ..bench.run_suite import run_suite

    chosen = load(suite)
    folder = output or f"results/{chosen.name}"
    options: Any = {"root": root, "address": address, "retry_failed": retry_failed}
    done = run_suite(chosen, folder, tell=lambda line: print(line, flush=True), **options)
    told = ", ".join(f"{count} {status}" for status, count in sorted(done.carried_out.items())) or "nothing to do"
    print(f"{told} in {done.seconds:.0f} s; {done.found} results were there; `lorainit report {folder}` shows them")


def _add_bench(parser: Any) -> None:
    parser.add_argument("suite", type=str, help="YAML file")
    parser.add_function_arguments(bench, as_group=False, skip={"suite", "retry_failed"})
    parser.add_argument("--retry-failed", dest="retry_failed", action="store_true", help="run failed trials again")


def report(results: str, output: str | None = None, suite: str | None = None) -> None:
    """Write what a benchmark has found: one HTML page, and the tables as Markdown and CSV.

    Args:
        results: folder of results, as ``lorainit bench`` made it.
        output: folder for the page and the tables; default: the folder of results.
        suite: YAML file of the suite to report, where several share the folder; default: the one that was run last.
    """
    from ..bench.suite_report import write_report

    print("\n".join(f"wrote {file}" for file in write_report(results, output or results, suite)))


def _add_report(parser: Any) -> None:
    parser.add_argument("results", type=str, help="folder of results, as `lorainit bench` made it")
    parser.add_function_arguments(report, as_group=False, skip={"results"})


BENCH = Command(bench, _add_bench, extra="bench")
REPORT = Command(report, _add_report, extra="bench")
