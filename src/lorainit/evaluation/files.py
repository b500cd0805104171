"""Benchmark files from a local folder or a data set repository on the hub, by the same code."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraInitError

_KINDS = {str: "text", int: "a whole number"}


def read_rows(source: str, file: str, columns: Mapping[str, type]) -> list[dict[str, Any]]:
    """Return the rows of a file.

    Args:
        source: local folder, or name of a data set repository on the hub.
        file: name of the file there: JSON lines, JSON, Parquet or CSV.
        columns: what each row must have, and of which type: `str`, `int`, or `object` for any.

    Raises:
        LoraInitError: no such file, no rows in it, or a row that lacks a column or holds something else there.
    """
    path = find(source, file)
    try:
        rows = _read(path)
    except (ValueError, OSError, csv.Error) as error:
        raise LoraInitError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise LoraInitError(f"{path} holds no rows")
    for number, row in enumerate(rows, 1):
        missing = [column for column in columns if column not in row]
        if missing:
            raise LoraInitError(f"{path}, row {number}: lacks the columns {missing}; it has {list(row)}")
        for column, kind in columns.items():
            if not isinstance(row[column], kind):
                raise LoraInitError(
                    f"{path}, row {number}, column '{column}': not {_KINDS[kind]}: {repr(row[column])[:60]}"
                )
    return rows


def find(source: str, file: str) -> Path:
    """Return a file's local path, downloaded from the hub where ``source`` is no local folder.

    Raises:
        LoraInitError: no such file.
    """
    if Path(source).is_dir():
        path = Path(source) / file
        if not path.is_file():
            raise LoraInitError(f"there is no file {path}")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, file, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise LoraInitError(
            f"'{source}' is no local folder, and the hub gives no file '{file}' of it: {reason}"
        ) from error


def _read(path: Path) -> list[dict[str, Any]]:
    match path.suffix:
        case ".parquet":
            import pyarrow.parquet

            rows: Any = pyarrow.parquet.read_table(path).to_pylist()
        case ".csv":
            with path.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        case ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        case ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        case other:
            raise ValueError(f"'{other}' is none of .jsonl, .json, .parquet, .csv")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of rows")
    return rows
