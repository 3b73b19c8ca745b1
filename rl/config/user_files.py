"""Files of the user's own code that a configuration names, and what a run is known by of them."""

import hashlib
import pathlib
from collections.abc import Sequence

from rl.config.sections import Config, is_user_function

COMPILED_KEYS = ("grpo.loss_type",)  # what they name is part of compiled programs
KEYS = (*COMPILED_KEYS, "grpo.advantage_estimator", "sampling.source")


def file_hashes(config: Config, keys: Sequence[str] = KEYS) -> dict[str, str]:
    """SHA-256 of each file that `keys` bring into use, by configuration key.

    Another content of any is another run. Another content of those of COMPILED_KEYS means other programs as well.
    """
    hashes = {}
    for key in keys:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value is not None and is_user_function(value):
            path = pathlib.Path(value.rpartition(":")[0]).expanduser()
            hashes[f"file of {key}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
