"""Files of a user's code that a configuration names, and their hashes, which are part of the run's identity."""

import hashlib
import pathlib
from collections.abc import Sequence

from rl.config.sections import Config, is_user_function

COMPILED_KEYS = ("grpo.loss_type",)  # what they name is part of compiled programs
KEYS = (*COMPILED_KEYS, "grpo.advantage_estimator", "sampling.source")


def file_hashes(config: Config, keys: Sequence[str] = KEYS) -> dict[str, str]:
    """{configuration key: SHA-256} of each file that `keys` name.

    Another hash means another run, and for COMPILED_KEYS other compiled programs as well.
    """
    hashes = {}
    for key in keys:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value is not None and is_user_function(value):
            path = pathlib.Path(value.rpartition(":")[0]).expanduser()
            hashes[f"file of {key}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
