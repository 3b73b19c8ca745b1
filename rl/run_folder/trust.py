"""Shows whether the code that a run folder names is this user's: an HMAC in run.json, with a key kept on the machine.

In: a configuration, and run.json. Out: the places of the configuration that name code, and the reason why the code is
not shown to be what this user ran. The HMAC covers run.json, which holds the sha256 of config.yml and of each file of
code. It shows who signed, not that the code is good: whoever runs as the same user can read the key. Not here: what
commands do with the answer (`rl.run_folder.folder.check_trust`). docs/security.md has the threat model.
"""

import dataclasses
import hashlib
import hmac
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import secrets
import stat
import tempfile
from collections.abc import Sequence
from typing import Any

from rewards.environment import OPENENV, is_ready_made
from rl.config.load import Config
from rl.config.objects import is_object
from rl.config.sections import is_user_function, prepare_keys, reward_model_source, source_kind
from rl.files.local_files import file_hash, write_file
from rl.run_folder.contents import CONFIG, FILES_KEY, FORMAT, FORMAT_KEY, IDENTITY

HMAC_KEY = "hmac"
FILE_KEYS = (FORMAT_KEY, FILES_KEY, HMAC_KEY)  # of run.json, about the file and not about what the run starts from

# Kinds of code, by what uses it.
REWARDS, MODEL, LOSS, ADVANTAGE, PROGRAMS, CACHE = "rewards", "model", "loss", "advantage", "programs", "cache"
SAMPLER, DATA, ENVIRONMENT, TRACKER = "sampler", "data", "environment", "tracker"
TO_TRAIN = (REWARDS, ENVIRONMENT, MODEL, LOSS, ADVANTAGE, SAMPLER, DATA, TRACKER, PROGRAMS, CACHE)
TO_EVALUATE = (REWARDS, ENVIRONMENT, MODEL, SAMPLER, DATA, CACHE)
TO_SAMPLE = (MODEL, SAMPLER, CACHE)
TO_READ = (DATA,)  # data rows, without a model
TO_REPLAY = (*TO_SAMPLE, *TO_READ)
TO_COMPILE = (MODEL, LOSS, CACHE)
TO_JUDGE = (REWARDS, DATA)

# Functions that this package defines, which are trusted. Other names in its modules, which they import, are not.
READY_MADE = (
    "rewards.choice:multiple_choice",
    "rewards.code:input_output",
    "rewards.code:unit_tests",
    "rewards.countdown:countdown",
    "rewards.format:format_regex",
    "rewards.format:regex_match",
    "rewards.format:think_format",
    "rewards.format:tag_format",
    "rewards.format:tag_count",
    "rewards.gym:reasoning_gym",
    "rewards.ifeval:ifeval",
    "rewards.language:language",
    "rewards.length:length_penalty",
    "rewards.number:exact_number_strict",
    "rewards.number:exact_number_flexible",
    "rewards.repetition:repetition_penalty",
    "rewards.schema:json_schema",
    "rewards.similarity:rouge",
    "rewards.similarity:edit_distance",
    "rewards.verify:math_verified",
)
_ASKS_SERVERS = "rewards.openenv_environment:OpenEnvPlayer"
_TRACKERS = "rl.run.trackers"
_KEY_BYTES = 32


class NoKeyError(Exception):
    """The user's key cannot be read or made; the message says why."""


@dataclasses.dataclass(frozen=True)
class Code:
    """A place of a configuration that names code.

    Attributes:
      key: a configuration key. name: its value. kind: one of the kinds above.
      file: the absolute path of the file with the code, or of the folder for `CACHE`; None where none is found.
    """

    key: str
    name: str
    kind: str
    file: pathlib.Path | None

    def __str__(self) -> str:
        return f"{self.key} {self.name!r} ({self.file or 'in no file that can be found'})"


def code_of(config: Config) -> list[Code]:
    """All code that a configuration names, except ready-made rewards, and objects, which the caller gives. Imports
    nothing. A reward model is no code.
    """
    found = [
        Code("rewards.functions", entry.function, REWARDS, _file_of(entry.function))
        for entry in config.rewards.functions
        if entry.function not in READY_MADE
        and not is_object(entry.function)
        and reward_model_source(entry.function) is None
    ]
    if source_kind(config.model.source) == "own":
        found.append(Code("model.source", str(config.model.source), MODEL, _file_of(str(config.model.source))))
    for key, kind in (("loss_type", LOSS), ("advantage_estimator", ADVANTAGE)):
        name = getattr(config.grpo, key)
        if is_user_function(name):
            found.append(Code(f"grpo.{key}", name, kind, _file_of(name)))
    if config.sampling.source is not None:
        name = config.sampling.source
        found.append(Code("sampling.source", name, SAMPLER, _file_of(name)))
    section = config.rollout
    environments = [] if section.agent is not None else [*section.environments.values()]
    agents = [] if section.agent is None else [section.agent]
    for key, names in (("environment", environments), ("agent", agents), ("tools", section.tools)):
        for name in names:
            if name.startswith(OPENENV):  # as a judge: whoever names the server hears what the policy says
                found.append(Code(f"rollout.{key}", name, ENVIRONMENT, _file_of(_ASKS_SERVERS)))
            elif not is_ready_made(name):
                found.append(Code(f"rollout.{key}", name, ENVIRONMENT, _file_of(name)))
    for key, function in prepare_keys(config).items():
        if function is not None:
            found.append(Code(key, function, DATA, _file_of(function)))
    for name in config.logging.trackers:
        if is_user_function(name):
            found.append(Code("logging.trackers", name, TRACKER, _file_of(name)))
        elif config.logging.tracker_args.get(name):  # whoever names the server gets what is sent, a password among it
            found.append(Code("logging.trackers", name, TRACKER, _file_of(f"{_TRACKERS}.to_{name}:make")))
    # Compiled programs are machine code, like any program.
    if config.compiled_file is not None:
        found.append(Code("compiled_file", config.compiled_file, PROGRAMS, _absolute(config.compiled_file)))
    cache = config.logging.compilation_cache
    if cache not in (None, "auto"):
        found.append(Code("logging.compilation_cache", cache, CACHE, _absolute(cache)))
    return found


def write_identity(
    folder: pathlib.Path, identity: dict[str, Any], config: Config, config_text: str, is_signed: bool = True
) -> str | None:
    """Writes run.json of a run with this configuration. Returns the reason why it has no HMAC; None where it has one,
    or should have none.

    Args:
      identity: the identity of what the run starts from.
      config_text: the text of config.yml.
    """
    files = {CONFIG: hashlib.sha256(config_text.encode()).hexdigest()}
    files |= {code.name: digest for code in code_of(config) if (digest := _digest(code)) is not None}
    record, problem = {FORMAT_KEY: FORMAT, **identity, FILES_KEY: files}, None
    if is_signed:
        try:
            record[HMAC_KEY] = _hmac(record, _key(make=True))
        except NoKeyError as error:
            problem = str(error)
    write_file(folder / IDENTITY, f"{json.dumps(record, indent=2)}\n".encode())
    return problem


def untrusted(folder: pathlib.Path, record: dict[str, Any], codes: Sequence[Code]) -> str | None:
    """The reason why config.yml and the code are not shown to be what this user signed in run.json; None where they
    are.

    Args:
      folder: the run folder. record: its run.json.
    """
    signed, files = record.get(HMAC_KEY), record.get(FILES_KEY)
    if not isinstance(signed, str) or not isinstance(files, dict):
        return f"{IDENTITY} has no HMAC: an older version wrote it, or no key could be kept where it was written"
    try:
        key = _key(make=False)
    except NoKeyError as error:
        return f"its HMAC cannot be checked: {error}"
    unsigned = {name: value for name, value in record.items() if name != HMAC_KEY}
    if not hmac.compare_digest(_hmac(unsigned, key).encode(), signed.encode()):
        return f"the HMAC of {IDENTITY} is not one of the key {_key_path()}: it was written or changed elsewhere"
    try:
        digest = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
    except OSError as error:
        return f"{CONFIG} cannot be read: {error}"
    if digest != files.get(CONFIG):
        return f"{CONFIG} has changed since {IDENTITY} was signed"
    home = folder.resolve()
    for code in codes:
        if code.file is not None and code.file.resolve().is_relative_to(home):
            return f"{code.name} lies in the run folder itself, where whoever hands it on can put anything beside it"
        if code.kind != CACHE and (files.get(code.name) is None or files[code.name] != _digest(code)):
            return f"{code.name} is not, or cannot be shown to be, what it was when {IDENTITY} was signed"
    return None


def digests(codes: Sequence[Code]) -> dict[str, str | None]:
    """{name: sha256 of the code's file}; None where it has no file."""
    return {code.name: _digest(code) for code in codes if code.kind != CACHE}


def _key_path() -> pathlib.Path:
    """The path of the user's key, in XDG_STATE_HOME if that is an absolute path, else in ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        folder = pathlib.Path(state) if os.path.isabs(state) else pathlib.Path.home() / ".local" / "state"
    except RuntimeError as error:  # the user's home is unknown
        raise NoKeyError(f"there is no place for a key: {error}; set XDG_STATE_HOME") from error
    return folder / "tandem" / "key"


def _key(make: bool) -> bytes:
    """The user's key, made if missing (`make`). NoKeyError where it cannot be read or made, or others can read it."""
    path = _key_path()
    try:
        if make and not path.exists():
            _make_key(path)
        with path.open("rb") as file:
            status, key = os.fstat(file.fileno()), file.read(_KEY_BYTES + 1)
    except OSError as error:
        raise NoKeyError(f"the key {path} cannot be {'made' if make else 'read'}: {error.strerror}") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise NoKeyError(
            f"the key {path} must be a file of this user that no other can read; chmod 600 it, or remove it"
        )
    if len(key) != _KEY_BYTES:
        raise NoKeyError(f"the key {path} must be {_KEY_BYTES} bytes, got {len(key)}; remove it")
    return key


def _make_key(path: pathlib.Path) -> None:
    """Writes a new key as a whole, and only if there is none yet."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".key-")  # readable by the user alone
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        return  # another process was first, and its key is taken
    finally:
        os.unlink(draft)


def _hmac(record: dict[str, Any], key: bytes) -> str:
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True, separators=(",", ":"))
    return hmac.new(key, b"tandem run.json\n" + text.encode(), hashlib.sha256).hexdigest()


def _digest(code: Code) -> str | None:
    if code.kind == CACHE or code.file is None:
        return None
    try:
        return file_hash(code.file)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def _absolute(path: str) -> pathlib.Path:
    return pathlib.Path(os.path.abspath(os.path.expanduser(path)))


def _file_of(function: str) -> pathlib.Path | None:
    """The file of `path/to/file.py:function` or `package.module:function`; nothing is imported to find it."""
    source = function.rpartition(":")[0]
    if source.endswith(".py"):
        return _absolute(source)
    spec, places = None, None
    for number, part in enumerate(source.split(".")):
        try:
            if number == 0:
                spec = importlib.util.find_spec(part) or importlib.machinery.PathFinder.find_spec(part, [os.getcwd()])
            else:
                spec = importlib.machinery.PathFinder.find_spec(part, places)
        except (ImportError, ValueError):  # ValueError: a name that no module can have
            return None
        if spec is None:
            return None
        places = spec.submodule_search_locations
        if number < source.count(".") and places is None:
            return None
    return pathlib.Path(spec.origin).absolute() if spec is not None and spec.has_location and spec.origin else None
