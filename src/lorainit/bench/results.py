"""Reads and writes the folder of a suite's results: one JSON file a trial, and an index of their sums.

The files are the results; the index only spares a resumed suite to read thousands of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..grids.result_files import Record, Status, read_record, replace_file, write_record

_INDEX = "index.jsonl"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the search for learning rates needs of a trial.

    Attributes:
        status: how the trial ended.
        loss: evaluation loss, infinite unless the status is ``done``.
        ratio: of a diagnosis, the suggested rate relative to vanilla's.
        stamp: size and time (in nanoseconds) of the file that this was read from.
        bound: of a diagnosis with the curvature, the rate by the curvature relative to the rate by the update's size.
    """

    status: Status
    loss: float
    ratio: float | None
    stamp: tuple[int, int]
    bound: float | None = None


class Results:
    """A folder with one JSON file a trial.

    The index holds a line a trial. A line counts only while its file is as it was when the line was written, and the
    index may be deleted.

    Attributes:
        folder: where the files lie.
        summaries: by key, of every trial that is done.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder; it is made if there is none."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stream: IO[str] | None = None
        self.summaries: dict[str, Summary] = {}
        self._refresh()

    def write(self, key: str, record: Record) -> Summary:
        """Write a trial's record; a record under the same key is replaced."""
        file = self.path(key)
        write_record(file, record)
        self.summaries[key] = summary = _summary(record, file)
        if self._stream is None:
            self._stream = (self.folder / _INDEX).open("a")
        self._stream.write(_line(key, summary))
        self._stream.flush()
        return summary

    def read(self, key: str) -> Record:
        """Return a trial's record."""
        return read_record(self.path(key))

    def path(self, key: str) -> Path:
        """Return where a trial's record is or goes."""
        return self.folder / f"{key}.json"

    def records(self) -> Iterator[Record]:
        """Yield every record, by key."""
        for key in sorted(self.summaries):
            yield self.read(key)

    def close(self) -> None:
        """Close the index."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _refresh(self) -> None:
        """Take from the index what still holds, read the other files, and write the index again if it was wrong."""
        known, lines = self._indexed()
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
            replace_file(self.folder / _INDEX, text)

    def _indexed(self) -> tuple[dict[str, Summary], int]:
        """Return what the index says, and how many lines it has."""
        known: dict[str, Summary] = {}
        lines: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / _INDEX).read_text().splitlines()
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was killed
                entry = json.loads(line)
                key = entry.pop("key")
                known[key] = Summary(**(entry | {"stamp": tuple(entry["stamp"])}))
        return known, len(lines)

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the key and the stamp of every file."""
        with os.scandir(self.folder) as cells:
            for cell in cells:
                if not cell.is_dir():
                    continue
                with os.scandir(cell) as files:
                    for file in files:
                        if file.name.endswith(".json"):
                            yield f"{cell.name}/{file.name.removesuffix('.json')}", _stamp(file)


def _summary(record: Record, file: Path) -> Summary:
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
