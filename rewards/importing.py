"""Functions by name: `module:function` or `path/to/file.py:function`.

In: the name. Out: the function, or a ValueError that says what does not import and what was probably meant. Importing
runs the user's code.
"""

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

# What code of the user can end with, an exit among them. KeyboardInterrupt is the user's own and not caught.
USER_ERRORS = (Exception, SystemExit)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def import_function(function: str, label: str) -> Callable[..., Any]:
    """`load_function` for any function that a configuration names; messages start with `label`."""
    source, colon, attribute = function.rpartition(":")
    if not colon or not source or not attribute:
        raise ValueError(f"{label}: function must be 'module:function' or 'path/to/file.py:function', got {function!r}")
    is_file = source.endswith(".py")
    try:
        module = _import_file(Path(source)) if is_file else importlib.import_module(source)
    except USER_ERRORS as error:  # importing runs the user's code
        hint = "" if is_file else "; for a file write its path with .py, as in ./my_rewards.py:function"
        raise ValueError(f"{label}: {source!r} does not import: {type(error).__name__}: {error}{hint}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(
                part, [name for name in dir(found) if callable(getattr(found, name, None))], n=1
            )
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{label}: {source!r} has no attribute {attribute!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{label}: {function!r} must be callable, got {type(found).__name__}")
    return found


def _import_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    # The folder is in the name, because two files called reward.py must not become one module. So is the text, because
    # an edited file must be imported anew in a process that lives on, such as a notebook's.
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes())
    module_name = f"reward_file_{path.stem}_{digest.hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before execution: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
