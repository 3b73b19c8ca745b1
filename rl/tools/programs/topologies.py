"""Devices to compile for, with their data sheets: absent TPUs, virtual CPUs, or the devices at hand.

In: what the command line asks for. Out: a list of devices, whose kind `CHIPS` may know. TPU topologies need `libtpu`,
which also runs on machines without a TPU.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

GIB, GB, TERA = 2**30, 10**9, 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """The vendor's numbers for one device: bfloat16 FLOP/s (dense), bytes of main memory, bytes/s to and from it."""

    name: str
    flops: float
    memory: int
    bandwidth: float
    source: str


_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
_H100 = Chip("H100 SXM", 989.4 * TERA, 80 * GB, 3.35e12, "https://www.nvidia.com/en-us/data-center/h100/")
# By the kind that jax reports.
CHIPS = {
    "TPU v4": Chip("v4", 275 * TERA, 32 * GIB, 1200e9, _CLOUD + "v4"),
    "TPU v5 lite": Chip("v5e", 197 * TERA, 16 * GB, 819e9, _CLOUD + "v5e"),
    "TPU v5": Chip("v5p", 459 * TERA, 95 * GIB, 2765e9, _CLOUD + "v5p"),
    "TPU v6 lite": Chip("v6e", 918 * TERA, 32 * GB, 1638e9, _CLOUD + "v6e"),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": Chip("H200 SXM", 989.4 * TERA, 141 * GB, 4.8e12, "https://www.nvidia.com/en-us/data-center/h200/"),
}

_MEGACORE = ("v4", "v5p")  # chips of two cores, which are one device to a program


def find_devices(topology: str | None, num_slices: int, devices: str | None) -> list[Any]:
    """The devices that the arguments of `grpo compile` name; without arguments the devices at hand.

    Raises:
      ValueError: arguments contradict each other, libtpu is missing or does not know the topology, or there are fewer
        CPU devices.
    """
    if topology is not None and devices is not None:
        raise ValueError(f"--topology and --devices must not be given together, got {topology} and {devices}")
    if num_slices < 1 or (num_slices > 1 and topology is None):
        raise ValueError(f"--slices must be >= 1, and above 1 only with --topology, got {num_slices}")
    if topology is not None:
        return tpu_topology(topology, num_slices)
    return list(jax.devices()) if devices is None else cpu_devices(devices)


def tpu_topology(name: str, num_slices: int = 1) -> list[Any]:
    """Devices of a TPU topology such as v5e:8x8 or v5p:8x16x16, slice by slice; they can be compiled for, not used."""
    if not re.fullmatch(r"[a-z0-9]+:\d+(x\d+)+", name):
        raise ValueError(f"--topology must look like v5e:4x4 or v5p:4x4x4, generation and chips per side, got {name!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f'--topology {name} needs libtpu, which is not installed; pip install "tandem-grpo[aot]"')
    # A compiler opens no TPU, so it need not be the only process with libtpu.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    arguments: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.partition(":")[0] in _MEGACORE:
        arguments["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **arguments)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(f"--topology must be one that libtpu knows, got {name!r}: {error}") from error
    return sorted(found.devices, key=lambda device: (getattr(device, "slice_index", 0), device.id))


def cpu_devices(text: str) -> list[Any]:
    """N virtual CPU devices for "cpu:N"."""
    found = re.fullmatch(r"cpu:([1-9]\d*)", text)
    if not found:
        raise ValueError(f"--devices must be cpu:N, a number of virtual CPU devices, got {text!r}")
    number = int(found[1])
    with contextlib.suppress(RuntimeError):  # jax may have started already, with other devices
        jax.config.update("jax_num_cpu_devices", number)
    present = jax.devices("cpu")
    if len(present) < number:
        raise ValueError(
            f"--devices {text} needs a process that starts with so many, got {len(present)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={number}"
        )
    return present[:number]
