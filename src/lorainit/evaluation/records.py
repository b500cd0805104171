"""A file of JSON lines that only grows: what stands in it is never computed or asked for again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from ..errors import LoraInitError


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 of what decides a line, so that a changed question is not given an old answer."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


class Records:
    """JSON lines by their ``fingerprint``; of several lines with the same one, the last counts, and all are kept.

    Lines are written whole, in one call, and reach the disk before `append` returns: a run that is killed loses nothing
    but the line that it was writing. Threads may share one object; two processes may not share one file.

    Args:
        path: the file; it is made with the first line.

    Raises:
        LoraInitError: a line is no JSON object with a fingerprint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._lines: dict[str, list[dict[str, Any]]] = {}
        if path.is_file():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._lines[key][-1]

    def history(self, key: str) -> list[dict[str, Any]]:
        """Return all lines with a fingerprint, the one that counts last."""
        return self._lines[key]

    def append(self, *lines: dict[str, Any]) -> None:
        """Add lines, all of them or, if the process dies now, possibly the first few."""
        # ASCII, because a reply may hold half a surrogate pair, which UTF-8 cannot
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as stream:
                stream.write(data)
                os.fsync(stream.fileno())
            for line in lines:
                self._lines.setdefault(line["fingerprint"], []).append(line)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # a killed run left half a line
            os.truncate(self.path, len(whole))
        for number, text in enumerate(whole.decode(errors="replace").split("\n")[:-1], 1):
            try:
                line = json.loads(text)
                self._lines.setdefault(line["fingerprint"], []).append(line)
            except (ValueError, TypeError, KeyError) as error:
                raise LoraInitError(
                    f"{self.path}, line {number}: not a line that lorainit wrote; move it away"
                ) from error
