"""What a run runs in: versions, devices, the command, the commit of the folder it was started in.

In: this process. Out: a mapping of short texts for `events.jsonl`. Nothing of the environment's variables is read.
"""

import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time

import jax

_PACKAGES = ("tandem-grpo", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def environment() -> dict[str, str]:
    """{name: text}, such as {"python": "3.12.1", "devices": "8 x cpu", ...}. What is not known is left out."""
    found = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "",
        "folder": os.getcwd(),
        "commit": _commit(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform of devices": jax.devices()[0].platform,
        "processes": str(jax.process_count()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count() or ""),
    }
    return {name: text for name, text in (found | {name: _version(name) for name in _PACKAGES}).items() if text}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit that is checked out in the working directory; "" without one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
