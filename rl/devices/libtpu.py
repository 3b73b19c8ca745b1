"""Settings for libtpu, Google's TPU runtime, before jax looks for devices.

If it is installed, jax asks it for TPUs on any machine. Without a chip it writes a page about missing environment
variables to stderr, which no log level turns off, and jax uses other devices. It is loaded all the same: a profile then
begins with its errors, and with jax 0.10 the process ends in a segmentation fault.
"""

import importlib.metadata
import importlib.util
import os
import pathlib

import jax

# Where there is one machine and no TPU both are true, and libtpu, also as a compiler, has nothing to complain of.
_OF_NO_TPU = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_HOST_BOUNDS": "1,1,1"}
_OF_OTHERS = "nvidia*", "kfd"  # device files of GPUs, which jax may use, or say that it cannot


def quiet_libtpu(devices: pathlib.Path = pathlib.Path("/dev")) -> None:
    """Keeps libtpu from complaining on a machine without a TPU: sets environment variables that are not set. Where jax
    has no other kind of device either, it is told to use the CPU, and does not load libtpu.

    To be called before jax looks for devices, more than once if need be. Where there may be a TPU nothing is set.

    Args:
      devices: the folder of device files. A TPU is accel* (up to v4) or a number in vfio (from v5e on).
    """
    if any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*")):
        return
    for name, value in _OF_NO_TPU.items():
        os.environ.setdefault(name, value)
    has_others = _has_plugins() or any(path for name in _OF_OTHERS for path in devices.glob(name))
    if asks_libtpu() and not has_others:
        jax.config.update("jax_platforms", "cpu")


def asks_libtpu() -> bool:
    """Whether jax asks libtpu for TPUs: it is installed, and nothing says which platforms to use."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    return not platforms and importlib.util.find_spec("libtpu") is not None


def _has_plugins() -> bool:
    """Whether packages for other devices are installed: https://docs.jax.dev/en/latest/pjrt_integration.html"""
    if importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins"):
        return True
    return bool(os.environ.get("PJRT_NAMES_AND_LIBRARY_PATHS"))
