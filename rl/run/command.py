"""The command line of `grpo train` and `grpo sft`: a configuration, overrides and two flags."""

import pathlib
import sys
from collections.abc import Callable, Sequence

from rl.config.load import Config
from rl.devices import hosts
from rl.devices.programs import use_compilation_cache
from rl.run_folder.folder import check_trust, load_run_config


def run_command(
    train: Callable[[Config, bool, bool], pathlib.Path], command: str, example: str, arguments: Sequence[str] | None
) -> None:
    """`COMMAND CONFIG [--check] [--trust] [key=value ...]`.

    Args:
      train: called with the configuration, the flag --check, and the flag --trust.
      command, example: the command's name and a recipe, for the message where there is no CONFIG.
      arguments: None: those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    check_only, trust = "--check" in arguments, "--trust" in arguments
    arguments = [argument for argument in arguments if argument not in ("--check", "--trust")]
    if not arguments:
        raise ValueError(f"{command} needs a config file, for example: {command} {example}")
    if check_only:
        sys.dont_write_bytecode = True  # of a user's modules
    path, *overrides = arguments
    config = load_run_config(path, overrides)
    with hosts.joined(config.distributed):
        check_trust(path, config, overrides, trust=trust)
        use_compilation_cache(config, check_only)
        train(config, check_only, trust)
