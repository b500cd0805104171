"""What every test file shares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

from golden import ABSENT, SHARED

# modules that are already loaded would escape the hook, silently
assert "lorainit" not in sys.modules
install_import_hook("lorainit", "shapes.check")

# doctests are looked for in every module, and this one cannot be imported without it
collect_ignore = [] if importlib.util.find_spec("deepspeed") else ["zero3.py"]

# the same examples in every run, and no deadline: the test machine is shared
hypothesis.settings.register_profile("lorainit", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("lorainit")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference values, data and models beside the checkout; skips the test where there is none."""
    if not SHARED.is_dir():
        pytest.skip(ABSENT)
    return SHARED
