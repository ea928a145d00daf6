"""Shared by all tests: small configs, and eight fake devices for the sharding tests."""

import os
import shutil
import tempfile

import hypothesis
import pytest
from processes import QUICK

# Before jax is imported anywhere: laws about meshes need more than one device, and nothing here
# runs for as long as it takes to compile it well.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICK}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that one test compiled serve the next, and the processes that tests start.
COMPILED = tempfile.mkdtemp(prefix="cascade-xla-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED

# The first example of a property may compile; speed lives in bench/, not in tests.
hypothesis.settings.register_profile("cascade", deadline=None, max_examples=50)
hypothesis.settings.load_profile("cascade")


@pytest.fixture
def smoke_config(tmp_path):
    """The shipped base config at smoke size, its files below a temporary folder."""
    from cascade import config  # which imports jax

    loaded = config.load("configs/emoji/base64.py:smoke")
    loaded.text_cache.folder = str(tmp_path / "text_cache")
    loaded.mesh.data, loaded.mesh.fsdp, loaded.mesh.tensor = 1, 1, 1
    return loaded


def pytest_unconfigure():
    """Leaves nothing behind."""
    shutil.rmtree(COMPILED, ignore_errors=True)
