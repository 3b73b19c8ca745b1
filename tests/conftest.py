"""Session setup: eight virtual CPU devices, before anything imports jax."""

import os
import shutil
import tempfile

# Assigned, not defaulted: a platform or flag from the caller's shell must not change what the tests test.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# No test may reach for a hub: a missing file should fail at once, not after a network time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two test processes may describe TPU chips at a time; none of them opens a real one.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _IS_WORKER:
    # Many tests train the same small models, in all processes of the session and in those that they start: each program
    # is compiled once for all of them, in a folder that goes with the session.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tandem-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure() -> None:
    if not _IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
