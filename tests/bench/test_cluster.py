from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
import ray

from lorainit import LoraInitError
from lorainit.bench.cluster import connected


@pytest.fixture
def closed():
    """A port of this machine at which nothing listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_an_address_at_which_nothing_listens_is_named_at_once(closed, address) -> None:
    begin, address = time.perf_counter(), address.format(closed)
    with pytest.raises(LoraInitError, match=f"no Ray cluster at '{address}': nothing answers at port {closed}"):
        with connected(address):
            pass
    assert time.perf_counter() - begin < 10  # Ray alone: 30 s and more


@pytest.mark.parametrize(
    ("address", "variable", "message"),
    [
        ("127.0.0.1", "", "no Ray cluster at '127.0.0.1': .*nvalid address"),
        ("auto", "127.0.0.1:{}", r"no Ray cluster at '127.0.0.1:{}' \(RAY_ADDRESS\): nothing answers"),
        (f"{'a' * 64}:6379", "", "no Ray cluster at 'a+:6379': nothing answers at port 6379"),
        ("127.0.0.1:port", "", "'127.0.0.1:port' is no address of a Ray cluster, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_other_addresses_without_a_cluster_are_named_too(closed, monkeypatch, address, variable, message) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable.format(closed))
    with pytest.raises(LoraInitError, match=message.format(closed)):
        with connected(address):
            pass


@pytest.mark.slow
def test_a_cluster_that_runs_is_joined_by_its_address() -> None:
    with connected(None):
        address = ray.get_runtime_context().gcs_address
        code = f"from lorainit.bench.cluster import connected\nwith connected('{address}'): print('joined')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip().endswith("joined"), done.stderr
