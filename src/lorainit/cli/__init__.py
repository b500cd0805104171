"""The command line: one file a command (or a few that belong together), and the table of them here.

A command's own parser is made when the command was chosen: ``lorainit --help`` and ``lorainit methods`` wait for no
torch and need no extra.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import LoraInitError
from ..version import __version__
from . import bench, diagnose, evaluate, export, init, methods, table, train
from .command import Command, Options, parse

COMMANDS: dict[str, Command] = {
    "methods": methods.COMMAND,
    "init": init.COMMAND,
    "train": train.COMMAND,
    "table": table.COMMAND,
    "diagnose": diagnose.COMMAND,
    "evaluate": evaluate.COMMAND,
    "evaluate mt-bench": evaluate.MT_BENCH,
    "evaluate alpaca-eval": evaluate.ALPACA_EVAL,
    "evaluate gsm8k": evaluate.GSM8K,
    "bench": bench.BENCH,
    "report": bench.REPORT,
    "export": export.COMMAND,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; a wrong input is one line on standard error and status 1."""
    try:
        function, options = _parse(sys.argv[1:] if arguments is None else arguments)
        function(**options)
    except argparse.ArgumentError as error:
        print(f"lorainit: error: {' '.join(str(error).split())} (see lorainit --help)", file=sys.stderr)
        return 2
    except (LoraInitError, OSError) as error:
        print(f"lorainit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lorainit: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> tuple[Any, Options]:
    """Return the chosen command's function and its options, nested ones as their dataclasses."""
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = _overview().parse_args([" ".join(arguments[:words])] if arguments else []).subcommand
    command = COMMANDS[name]
    return command.run, parse(name, command, arguments[words:])


def _overview() -> argparse.ArgumentParser:
    """Return the parser of the first word: a command, ``--help`` or ``--version``."""
    parser = _Overview(prog="lorainit", description="Better starting values for LoRA adapters.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="subcommand", required=True, metavar="subcommand")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    parser.epilog = "lorainit SUBCOMMAND --help tells a command's options"
    return parser


class _Overview(argparse.ArgumentParser):
    """A parser that leaves it to `main` to tell an error."""

    def error(self, message: str) -> Any:
        """Raise instead of ending the process."""
        raise argparse.ArgumentError(None, message)
