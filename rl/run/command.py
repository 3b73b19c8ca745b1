"""The command line of `grpo train` and `grpo sft`: configuration, overrides, flags, a folder to branch into."""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence

from rl.config.load import HORIZON, Config, override_values
from rl.devices import hosts
from rl.devices.programs import use_compilation_cache
from rl.run.metrics import newest_changes, read_events
from rl.run_folder.contents import is_run_folder
from rl.run_folder.folder import check_trust, load_run_config
from rl.state.branch import make_branch


def run_command(
    train: Callable[[Config, bool, bool], pathlib.Path], command: str, example: str, arguments: Sequence[str] | None
) -> None:
    """`COMMAND CONFIG [--check] [--trust] [--branch FOLDER] [key=value ...]`.

    Args:
      train: called with the configuration, the flag --check, and the flag --trust.
      command, example: the command's name and a recipe, for the message where there is no CONFIG.
      arguments: None: those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    check_only, trust = "--check" in arguments, "--trust" in arguments
    arguments = [argument for argument in arguments if argument not in ("--check", "--trust")]
    arguments, branch = _branch_of(arguments)
    if not arguments:
        raise ValueError(f"{command} needs a config file, for example: {command} {example}")
    if check_only:
        sys.dont_write_bytecode = True  # of a user's modules
    path, *overrides = arguments
    if branch is not None:
        if pathlib.Path(path).is_file():
            raise ValueError(
                f"--branch must follow a run folder, from whose newest checkpoint it goes on, got {path!r}, a file; "
                f"name the run, or begin anew by output_dir={branch}"
            )
        if check_only:
            raise ValueError(f"--branch must be left out with --check, which changes nothing, got {branch!r}")
        if "output_dir" in override_values(overrides):
            raise ValueError(f"output_dir must be left out with --branch {branch}, which names the run's folder")
        overrides = [*_newest_steps(path), *overrides, f"output_dir={json.dumps(branch)}"]
    config = load_run_config(path, overrides)
    with hosts.joined(config.distributed):
        check_trust(path, config, overrides, trust=trust)
        use_compilation_cache(config, check_only)
        if branch is not None:
            kind = "sft" if command == "grpo sft" else "grpo"
            said = hosts.from_first(lambda: make_branch(path, config, kind))
            print(said, file=hosts.console_stream())
        train(config, check_only, trust)


def _newest_steps(run: str) -> list[str]:
    """Overrides for the number of steps and the end of the schedule, where the newest start of a run changed them."""
    changed = newest_changes(read_events(run)) if is_run_folder(run) else {}
    found = {key: changed[key] for key in ("grpo.steps", "sft.steps", HORIZON) if key in changed}
    return [f"{key}={json.dumps(value)}" for key, value in found.items() if value is None or type(value) is int]


def _branch_of(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without `--branch FOLDER`, and that folder."""
    rest, folder, left = [], None, iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name != "--branch":
            rest.append(argument)
        elif not (folder := value if equals else next(left, "")):
            raise ValueError("--branch must be followed by a new folder, got none; for example --branch runs/second")
    return rest, folder
