"""The folder of results: one JSON a trial, which is the truth, and an index of their sums for a quick resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

Status = Literal["done", "failed", "diverged", "stopped"]
_INDEX = "index.jsonl"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the search has to know about a trial.

    Attributes:
        status: ``done``; ``failed`` by an error; ``diverged`` to a loss that is no number; ``stopped`` early by ASHA.
        loss: evaluation loss, infinite unless done.
        ratio: of a diagnosis, the suggested rate relative to vanilla's.
        stamp: (size, nanoseconds) of the file that this was read from.
        bound: of a diagnosis with the curvature, the rate by it relative to that by the size of the update.
    """

    status: Status
    loss: float
    ratio: float | None
    stamp: tuple[int, int]
    bound: float | None = None


class Results:
    """A folder with one JSON a trial.

    A trial is there if its file is: files are written beside and renamed, so that no kill leaves half of one. The index
    holds a line a trial, is only ever believed for a file that is as it was when the line was written, and may be
    deleted.

    Args:
        folder: is made if there is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stream: IO[str] | None = None
        self.summaries: dict[str, Summary] = {}
        self._refresh()

    def write(self, key: str, record: dict[str, Any]) -> Summary:
        """Write a trial's record; a record under the same key is replaced."""
        file = self.path(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
        self.summaries[key] = summary = _summary(record, file)
        if self._stream is None:
            self._stream = (self.folder / _INDEX).open("a")
        self._stream.write(_line(key, summary))
        self._stream.flush()
        return summary

    def read(self, key: str) -> dict[str, Any]:
        """Return a trial's record."""
        return json.loads(self.path(key).read_text())

    def path(self, key: str) -> Path:
        """Return where a trial's record is or goes."""
        return self.folder / f"{key}.json"

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield every record, by key."""
        for key in sorted(self.summaries):
            yield self.read(key)

    def close(self) -> None:
        """Close the index."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _refresh(self) -> None:
        """Take from the index what is still so, read the files that it does not know, write it anew if it was wrong."""
        known: dict[str, Summary] = {}
        lines = 0
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / _INDEX).read_text().splitlines():
                lines += 1
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was killed
                    entry = json.loads(line)
                    key = entry.pop("key")
                    known[key] = Summary(**(entry | {"stamp": tuple(entry["stamp"])}))
        for key, stamp in self._files():
            summary = known.get(key)
            if summary is None or summary.stamp != stamp:
                try:
                    summary = _summary(self.read(key), self.path(key))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    warnings.warn(f"{self.path(key)} holds no trial, which counts as missing: {error!r}", stacklevel=3)
                    continue
            self.summaries[key] = summary
        if lines != len(self.summaries) or any(known.get(key) != s for key, s in self.summaries.items()):
            text = "".join(_line(key, summary) for key, summary in self.summaries.items())
            _replace(self.folder / _INDEX, text)

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        with os.scandir(self.folder) as cells:
            for cell in cells:
                if not cell.is_dir():
                    continue
                with os.scandir(cell) as files:
                    for file in files:
                        if file.name.endswith(".json"):
                            yield f"{cell.name}/{file.name.removesuffix('.json')}", _stamp(file)


def write_json(file: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all, one line a top-level key: long lists stay readable in a diff."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in record.items())
    _replace(file, f"{{\n{lines}\n}}\n")


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())  # a power cut after the rename must not leave an empty file
    partial.replace(file)


def _summary(record: dict[str, Any], file: Path) -> Summary:
    status: Status = record["status"]
    loss = record["metrics"].get("loss") if status == "done" else None
    advice = record.get("advice", {})
    bound = advice["curvature_lr"] / advice["magnitude_lr"] if advice.get("curvature_lr") else None
    return Summary(status, float("inf") if loss is None else loss, record.get("ratio"), _stamp(file), bound)


def _stamp(file: Path | os.DirEntry[str]) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _line(key: str, summary: Summary) -> str:
    return json.dumps({"key": key, **dataclasses.asdict(summary)}) + "\n"
