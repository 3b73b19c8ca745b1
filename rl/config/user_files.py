"""Files of a user's code that a configuration names, and their hashes, which are part of the run's identity."""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence

from rl.config.sections import Config, is_user_function, prepare_keys

COMPILED_KEYS = ("grpo.loss_type",)  # what they name is part of compiled programs
KEYS = (*COMPILED_KEYS, "grpo.advantage_estimator", "sampling.source")


def file_hashes(config: Config, keys: Sequence[str] = KEYS) -> dict[str, str]:
    """{configuration key: SHA-256} of each file that `keys` name.

    Another hash means another run, and for COMPILED_KEYS other compiled programs as well.
    """
    named = {key: getattr(getattr(config, section), name) for key in keys for section, _, name in [key.partition(".")]}
    return _hashes(named)


def prepare_hashes(config: Config) -> dict[str, str]:
    """{configuration key: SHA-256} of each file that prepares the data rows of a run; another hash means another run.
    The sets of its evaluations may change.
    """
    return _hashes({key: value for key, value in prepare_keys(config).items() if not key.startswith("eval.")})


def _hashes(named: Mapping[str, str | None]) -> dict[str, str]:
    hashes = {}
    for key, value in named.items():
        if value is not None and is_user_function(value):
            path = pathlib.Path(value.rpartition(":")[0]).expanduser()
            hashes[f"file of {key}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
