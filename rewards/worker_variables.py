"""The environment variables and the memory of a reward worker."""

import math
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLES = (
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "TZ",
    "PYTHONPATH",
    "PYTHONHASHSEED",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
    "OMP_NUM_THREADS",
)
_PREFIX = "LC_"  # of the locale's variables
_CHAIN = 10  # the longest chain of errors that is followed; user code can make it a circle


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a text that cannot be the name of an environment variable."""
    for name in names:
        if not name or "=" in name or "\0" in name:
            raise ValueError(
                f"rewards.env must list names of environment variables, without their values, got {_name_of(name)!r}"
            )


def check_memory_gb(memory_gb: float | None, section: str = "rewards") -> None:
    """Raises ValueError for a memory limit (None: no limit) that makes no sense, or cannot be kept on this machine.
    section: of the configuration, for messages.
    """
    if memory_gb is None:
        return
    if not 0 < memory_gb < math.inf:
        raise ValueError(f"{section}.memory_gb must be > 0 and finite, got {memory_gb}; null is no limit")
    if sys.platform != "linux":
        raise ValueError(
            f"{section}.memory_gb is kept on Linux only, got {memory_gb} on {sys.platform}; set it to null"
        )


def worker_environment(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker: `VARIABLES`, the locale, and `names`.

    This package is importable in it, and the hashes of strings are equal in every worker and every run.

    Raises ValueError for a name that the environment does not hold.
    """
    check_names(names)
    missing = [name for name in names if name not in environment]
    if missing:
        raise ValueError(
            f"rewards.env passes {', '.join(missing)} to its workers, but this process's environment holds no "
            "such variable; export it, or take its name out of rewards.env"
        )
    kept = {
        name: value
        for name, value in environment.items()
        if name in VARIABLES or name in names or name.startswith(_PREFIX)
    }
    root = str(Path(__file__).resolve().parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        # Not for an installed package: site-packages on PYTHONPATH would come before the standard library.
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    # A function that iterates over a set of strings gives the same rewards after a resume.
    kept.setdefault("PYTHONHASHSEED", "0")
    return kept


def missing_variable(error: BaseException | None) -> str:
    """The end of a message about an error of user code that a variable missing in the environment caused, or nothing.

    Such an error is a KeyError of `os.environ`, or was caused by one.
    """
    read = type(os.environ).__getitem__.__code__
    for _ in range(_CHAIN):
        if error is None:
            break
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if isinstance(error, KeyError) and trace is not None and trace.tb_frame.f_code is read and error.args:
            name = str(error.args[0])[:100]
            return f"; the worker's environment does not hold {name}: rewards.env: [{name}] passes it from this one's"
        error = error.__cause__ or error.__context__
    return ""


def _name_of(text: str) -> str:
    """A text without the part that may be a variable's value."""
    return text.partition("=")[0] + ("=..." if "=" in text else "")
