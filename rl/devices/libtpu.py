"""Settings for libtpu, Google's TPU runtime, before jax looks for devices.

If it is installed, jax asks it for TPUs on any machine. Without a chip it writes a page about missing environment
variables to stderr, which no log level turns off, and jax uses other devices.
"""

import os
import pathlib

# Where there is one machine and no TPU both are true, and libtpu, also as a compiler, has nothing to complain of.
_OF_NO_TPU = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_HOST_BOUNDS": "1,1,1"}


def quiet_libtpu(devices: pathlib.Path = pathlib.Path("/dev")) -> None:
    """Keeps libtpu from complaining on a machine without a TPU: sets environment variables that are not set.

    To be called before jax looks for devices, more than once if need be. Where there may be a TPU nothing is set.

    Args:
      devices: the folder of device files. A TPU is accel* (up to v4) or a number in vfio (from v5e on).
    """
    if not any(devices.glob("accel*")) and not any(devices.glob("vfio/[0-9]*")):
        for name, value in _OF_NO_TPU.items():
            os.environ.setdefault(name, value)
