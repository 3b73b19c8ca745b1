"""Session setup: eight virtual CPU devices, before anything imports jax."""

import os

# Assigned, not defaulted: a platform or flag from the caller's shell must not change what the tests test.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is LLVM optimising programs that then run for milliseconds; unoptimised, the same HLO is
# compiled in half of it.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# No test may reach for a hub: a missing file should fail at once, not after a network time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two test processes may describe TPU chips at a time; none of them opens a real one.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
