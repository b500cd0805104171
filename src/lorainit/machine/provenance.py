"""Where a result comes from: versions, hashes, command, device, state of the source tree."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("lorainit", "torch", "peft", "transformers", "accelerate", "datasets", "safetensors", "numpy")


def collect(**hashes: str | None) -> dict[str, Any]:
    """Return what is needed to repeat a run; ``hashes`` name the content it used (model, data)."""
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "hashes": hashes,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": _device(),
        "git": _git(),
    }


def hash_weights(folder: str | Path) -> str | None:
    """Return the SHA-256 of a local model folder's weight files; None where the model is not a local folder."""
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"type": "cuda" if torch.cuda.is_available() else "cpu", "name": name, "threads": torch.get_num_threads()}


def _git() -> dict[str, Any] | None:
    """Return commit and dirty flag of the source tree that the package is imported from, if it is one."""
    here = Path(__file__).parents[1]  # the package's own folder

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return None
