"""Shared by all tests: small configs, and eight fake devices for the sharding tests."""

import functools
import os
import shutil
import sys
import tempfile

import hypothesis
import pytest
from processes import QUICK

# Before jax is imported anywhere: laws about meshes need more than one device, and nothing here
# runs for as long as it takes to compile it well.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICK}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that one test compiled serve the next, the processes that tests start and pytest's other
# workers, which inherit the folder.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="cascade-xla-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# The first example of a property may compile; speed lives in bench/, not in tests.
hypothesis.settings.register_profile("cascade", deadline=None, max_examples=50)
hypothesis.settings.load_profile("cascade")


@pytest.fixture(scope="module", autouse=True)
def forgets():
    """What a file compiled goes with it: all files' together would fill 6 GB a worker."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def smoke_config(tmp_path):
    """The shipped base config at smoke size, its files below a temporary folder."""
    from cascade import config  # which imports jax

    loaded = config.load("configs/emoji/base64.py:smoke")
    loaded.text_cache.folder = str(tmp_path / "text_cache")
    loaded.mesh.data, loaded.mesh.fsdp, loaded.mesh.tensor = 1, 1, 1
    return loaded


@pytest.fixture(scope="module")
def one_device():
    """Trains on one device, as most users do: eight take longer where no law is about them."""
    import jax

    from cascade.parallel import mesh

    with pytest.MonkeyPatch.context() as patch:
        alone = functools.partial(mesh.make_mesh, devices=jax.devices()[:1])
        patch.setattr(mesh, "make_mesh", alone)
        yield


def pytest_unconfigure():
    """Leaves nothing behind."""
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
