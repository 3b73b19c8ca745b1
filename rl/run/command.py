"""The command line of `grpo train` and `grpo sft`: configuration, overrides, flags, a folder to branch into."""

import json
import pathlib
import sys
from collections.abc import Callable, Collection, Sequence

from rl.config.load import HORIZON, RESUMABLE_KEYS, Config, override_values
from rl.devices import hosts
from rl.devices.programs import use_compilation_cache
from rl.run.metrics import newest_changes, read_events
from rl.run_folder.contents import IDENTITY, is_config_changed, is_run_folder, read_json
from rl.run_folder.folder import check_trust, load_run_config
from rl.state.branch import make_branch

_PLAIN = (int, float, type(None))  # truth values are integers
_TEXTS = ("checkpoint.best.metric", "checkpoint.best.mode", "eval.reward")  # which name no place and no code
_OF_ONE_START = ("output_dir", "checkpoint.overwrite", "distributed", "profile")


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
    given = override_values(overrides)
    newest, said = _as_started_last(path, given)
    if branch is not None:
        if pathlib.Path(path).is_file():
            raise ValueError(
                f"--branch must follow a run folder, from whose newest checkpoint it goes on, got {path!r}, a file; "
                f"name the run, or begin anew by output_dir={branch}"
            )
        if check_only:
            raise ValueError(f"--branch must be left out with --check, which changes nothing, got {branch!r}")
        if "output_dir" in given:
            raise ValueError(f"output_dir must be left out with --branch {branch}, which names the run's folder")
        overrides.append(f"output_dir={json.dumps(branch)}")
    overrides = [*newest, *overrides]
    config = load_run_config(path, overrides)
    with hosts.joined(config.distributed):
        check_trust(path, config, overrides, trust=trust)
        use_compilation_cache(config, check_only)
        if said and not config.logging.quiet:
            print(said, file=hosts.console_stream())
        if branch is not None:
            kind = "sft" if command == "grpo sft" else "grpo"
            said = hosts.from_first(lambda: make_branch(path, config, kind))
            print(said, file=hosts.console_stream())
        train(config, check_only, trust)


def _as_started_last(run: str, given: Collection[str]) -> tuple[list[str], str]:
    """(overrides, what is said of them): what the newest start of a run had otherwise than its config.yml.

    events.jsonl is not signed, so nothing that names a place or code is taken from it. Nothing at all is taken where
    config.yml is not as the run wrote it: an edited one is the user's newest word.

    Args:
      given: the keys of the command line, which come first.
    """
    folder = pathlib.Path(run)
    if not is_run_folder(run) or is_config_changed(folder, read_json(folder / IDENTITY)):
        return [], ""
    changed = {
        key: value
        for key, value in newest_changes(read_events(run)).items()
        if _within(key, (*RESUMABLE_KEYS, HORIZON)) and not _within(key, _OF_ONE_START) and not _stands(key, given)
    }
    taken = {key: value for key, value in changed.items() if isinstance(value, _PLAIN) or key in _TEXTS}
    texts = [f"{key}={json.dumps(value)}" for key, value in taken.items()]
    left, said = [key for key in changed if key not in taken], []
    if texts:
        said.append(f"as in the newest start of {run}, and not as in its config.yml: {' '.join(texts)}")
    if left:
        said.append(f"as in config.yml of {run}, though its newest start had other values: {', '.join(left)}")
    return texts, "\n".join(said)


def _stands(key: str, given: Collection[str]) -> bool:
    """Whether a key, a mapping that it is in, or a part of it is on the command line."""
    return _within(key, given) or any(each.startswith(f"{key}.") for each in given)


def _within(key: str, keys: Collection[str]) -> bool:
    """Whether a key is one of `keys`, or in a section or mapping that is."""
    return any(key == each or key.startswith(f"{each}.") for each in keys)


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
