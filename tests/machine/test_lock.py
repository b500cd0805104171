from __future__ import annotations

import subprocess
import sys
import warnings

import filelock
import pytest

from lorainit.errors import LoraInitError
from lorainit.machine.lock import taken


def test_a_lock_is_for_one_and_its_file_stays_for_as_long_as_it_is_held(tmp_path) -> None:
    file = tmp_path / "folder" / "lock"
    with taken(file) as mine:
        for _ in range(2):  # whoever does not get it leaves it as it is
            with taken(file) as again:
                assert (mine, again) == (True, False)
            assert file.exists()
    with taken(file) as mine:
        assert mine


def test_a_lock_falls_with_an_error(tmp_path) -> None:
    file = tmp_path / "lock"
    with pytest.raises(KeyboardInterrupt), taken(file):
        raise KeyboardInterrupt
    with taken(file) as mine:
        assert mine


@pytest.mark.parametrize("left", ["", "1", "999999999"], ids=["empty", "living process", "dead process"])
def test_a_file_that_nobody_holds_is_no_lock(tmp_path, left) -> None:
    file = tmp_path / "lock"
    file.write_text(left)
    with taken(file) as mine:
        assert mine


def test_a_lock_falls_with_its_process(tmp_path) -> None:
    file = tmp_path / "lock"
    code = (
        "import pathlib, sys; from lorainit.machine.lock import taken\n"
        "with taken(pathlib.Path(sys.argv[1])) as mine: print(mine, flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(file)], **pipes) as other:
        assert other.stdout
        assert other.stdout.readline() == b"True\n"
        with taken(file) as mine:
            assert not mine
        assert file.exists()
        other.kill()
    with taken(file) as mine:
        assert mine


def test_a_second_driver_is_kept_out_of_a_benchmarks_folder(tmp_path) -> None:
    from lorainit.bench.run_suite import _alone

    with _alone(tmp_path):
        with pytest.raises(LoraInitError, match=f"another process is at work in {tmp_path}"), _alone(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    with _alone(tmp_path):
        pass


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch) -> None:
    def acquire(lock: filelock.FileLock) -> None:
        lock.__class__ = filelock.SoftFileLock  # as filelock does there

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with warnings.catch_warnings(), pytest.raises(LoraInitError, match="lock: the file system has no locks"):
        warnings.simplefilter("ignore")
        with taken(tmp_path / "lock"):
            pass
