"""Connects to a Ray cluster, or runs one on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import ray

from ..errors import LoraInitError

PORT_TIMEOUT = 5.0  # seconds within which a cluster's port has to open
CLIENT_PORT = 10001  # Ray's, where a ray:// address names none
OBJECT_STORE_BYTES = 256 * 2**20  # of a cluster on this machine: records are small


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster for as long as the block lasts; without an address, run one on this machine.

    A program that has started Ray already keeps its own.

    Raises:
        LoraInitError: there is no cluster at that address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        _check_port(address)
        options |= {"address": address}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = "Ray does not start on this machine" if address is None else f"no Ray cluster at '{address}'"
        raise LoraInitError(f"{what}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Raise at once where nothing listens at an address; Ray itself would wait for minutes.

    An address without a port is left to Ray, which refuses a bare host at once and looks on this machine for ``auto``.
    """
    # Ray takes this variable for `auto`
    found = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    named = f"'{address}'" if found == address else f"'{found}' (RAY_ADDRESS)"
    scheme, _, place = found.rpartition("://")
    try:
        parts = urlsplit(f"//{place}")
        port = parts.port or (CLIENT_PORT if scheme == "ray" else None)
    except ValueError as error:
        raise LoraInitError(f"{named} is no address of a Ray cluster, HOST:PORT or ray://HOST:PORT: {error}") from error
    if port is not None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=PORT_TIMEOUT).close()
        except (OSError, UnicodeError) as error:  # the latter for a host that is no name
            raise LoraInitError(f"no Ray cluster at {named}: nothing answers at port {port}: {error}") from error
