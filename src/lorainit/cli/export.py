"""``lorainit export``."""

from __future__ import annotations

from typing import Any

from ..errors import LoraInitError
from .command import Command


def export_adapter(
    source: str, output: str, rank: int | None = None, merge: bool = False, model: str | None = None
) -> None:
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
        from ..train.merge import merge_folder

        merge_folder(source, output, model)
    else:
        from rich.console import Console
        from rich.table import Table

        from ..saving import checkpoint

        errors = checkpoint.export(source, output, rank=rank)
        if rank is not None:
            table = Table("layer", "relative error", title=f"truncated to rank {rank}")
            for name, error in errors.items():
                table.add_row(name, f"{error:.2e}")
            Console().print(table)
    print(f"saved to {output}")


def _add_options(parser: Any) -> None:
    parser.add_argument("source", type=str, help="adapter folder, for example a Trainer checkpoint")
    parser.add_function_arguments(export_adapter, as_group=False, skip={"source", "merge"})
    parser.add_argument("--merge", action="store_true", help="write the merged model instead of an adapter")


COMMAND = Command(export_adapter, _add_options)
