"""Reward functions given as objects: the bytes that a worker loads, and the hash that identifies them.

In: a function of a notebook or a script, a closure, a lambda, a callable object. Out: its bytes by cloudpickle, and a
hash that is the same in the next session. The bytes go to a worker through its pipe, never to a disk, and are loaded
only there. The hash covers everything that decides the function's rewards:

    its source, default and captured values, attributes, and what it reaches by global names, and so on from there
    of what a module holds that can be imported: the name; of the given function itself the source too

Values that cannot be compared in this way (an open file, a lock, a generator) are refused by name. So are values that
would make a worker import jax or `rl`.
"""

import ast
import copyreg
import dataclasses
import dis
import hashlib
import inspect
import io
import pickle
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_TOO_HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "rl")  # packages that a worker must not import
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_GLOBAL_OPERATIONS = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")
# Attributes of a class that Python derives from the others, or that name its place.
_DERIVED = (
    *("__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__classcell__"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__abstractmethods__", "_abc_impl"),
)
_WAY_OUT = "make it inside the function, or capture plain values only"


def to_bytes(function: Callable[..., Any], label: str) -> bytes:
    """The function as bytes for `from_bytes`, with everything that it needs and that no module holds.

    label: the beginning of messages.

    Raises ValueError where a part cannot be pickled, or would make a worker import jax or `rl`.
    """
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        def persistent_id(self, obj: Any) -> None:  # called with everything that is pickled
            _check_light(obj, label, "something it needs")

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(function)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{label}: it cannot be sent to a reward worker: {error}; {_WAY_OUT}") from error
    return buffer.getvalue()


def from_bytes(data: bytes, label: str) -> Callable[..., Any]:
    """The function from the bytes of `to_bytes`. Loading runs code, so this belongs in a reward worker.

    Raises ValueError where a module that it needs does not import here.
    """
    try:
        return pickle.loads(data)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which can raise anything
        raise ValueError(
            f"{label}: it does not load in a reward worker: {type(error).__name__}: {error}; modules that it needs "
            "must import there"
        ) from error


def identity(function: Callable[..., Any], label: str) -> str:
    """SHA-256, in hex, of everything that decides what the function computes; see the module.

    label: the beginning of messages.

    Raises ValueError, naming the value, where a part cannot be compared with the next session.
    """
    try:
        return _Identities(label).given(function).hex()
    except RecursionError as error:
        raise ValueError(f"{label}: what it captures must not be nested so deep ({error}); {_WAY_OUT}") from error


class _Identities:
    """Hashes of values. Values of one function share the hashes of common parts."""

    def __init__(self, label: str):
        self._label = label
        self._open: list[int] = []  # ids of the values being hashed; each is a part of the one before
        self._done: dict[int, tuple[bytes, Any]] = {}  # {id: (hash, value)}; keeping the value keeps its id unique

    def given(self, function: Callable[..., Any]) -> bytes:
        """The hash of the given function. For a function that a module holds, it also covers the source."""
        source = ""
        if isinstance(function, types.FunctionType) and _is_importable(function):
            source = self._source(function.__code__, function.__name__)
        return _hash("given", source, self.of(function, getattr(function, "__name__", type(function).__name__)))

    def of(self, value: Any, path: str) -> bytes:
        """The hash of any value. path: its name in messages."""
        _check_light(value, self._label, path)
        if type(value) in _ATOMS:
            return _hash(type(value).__name__, repr(value))
        key = id(value)
        if key in self._done:
            return self._done[key][0]
        if key in self._open:
            return _hash("a value that this is a part of", str(self._open.index(key)))
        self._open.append(key)
        result = _hash(*self._parts(value, path))
        self._open.pop()
        self._done[key] = result, value
        return result

    def _parts(self, value: Any, path: str) -> Iterator[str | bytes]:
        kind = type(value)
        yield kind.__name__
        if kind in (list, tuple):
            yield from (self.of(item, f"{path}[{place}]") for place, item in enumerate(value))
        elif kind is dict:
            for key, item in value.items():
                yield self.of(key, f"a key of {path}")
                yield self.of(item, f"{path}[{key!r}]")
        elif kind in (set, frozenset):
            yield from sorted(self.of(item, f"an element of {path}") for item in value)
        elif isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, (types.FunctionType, type)) and _is_importable(value):
            yield from (value.__module__, value.__qualname__)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value, path)
        elif isinstance(value, type):
            yield from self._class(value, path)
        elif isinstance(value, types.MethodType):
            yield self.of(value.__func__, path)
            yield self.of(value.__self__, f"the object of {path}")
        elif isinstance(value, (staticmethod, classmethod)):
            yield self.of(value.__func__, path)
        elif isinstance(value, property):
            yield from (self.of(part, path) for part in (value.fget, value.fset, value.fdel))
        else:
            yield from self._object(value, path)

    def _function(self, function: types.FunctionType, path: str) -> Iterator[str | bytes]:
        code = function.__code__
        for module in sorted(_imported_names(code)):
            _check_package(module, f"{path} imports", self._label)
        yield self._source(code, path)
        for name in sorted(_global_names(code) & {*function.__globals__}):
            yield name
            yield self.of(function.__globals__[name], name)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            yield name
            try:
                content = cell.cell_contents
            except ValueError:  # a name that has no value yet
                continue
            yield self.of(content, name)
        for part in ("__defaults__", "__kwdefaults__", "__dict__"):
            yield self.of(getattr(function, part), f"{part} of {path}")

    def _class(self, found: type, path: str) -> Iterator[str | bytes]:
        yield from (self.of(base, f"base {base.__name__} of {path}") for base in found.__bases__)
        is_made = dataclasses.is_dataclass(found) or issubclass(found, tuple)  # has methods that no text says
        if dataclasses.is_dataclass(found):
            yield repr(found.__dataclass_params__)  # pyright: ignore[reportAttributeAccessIssue]
            for field in dataclasses.fields(found):
                yield f"{field.name}: {field.type}"
                yield self.of((field.default, field.default_factory), f"field {field.name} of {path}")
        for name, value in vars(found).items():
            if name in _DERIVED or isinstance(value, types.MemberDescriptorType) or (is_made and _is_of_text(value)):
                continue
            yield name
            yield self.of(value, f"{path}.{name}")

    def _object(self, value: Any, path: str) -> Iterator[str | bytes]:
        """The parts from which pickle would rebuild an object."""
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            reduced: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:  # it may be user code, which can raise anything
            raise ValueError(self._no_form(path, f"is of type {type(value).__name__}", str(error))) from error
        if isinstance(reduced, str):  # the name of a global
            yield from (str(getattr(value, "__module__", "")), reduced)
            return
        for place, part in enumerate(reduced):  # of these, iterators give entries of a list, or pairs of a mapping
            yield self.of(list(part) if place in (3, 4) and part is not None else part, path)

    def _source(self, code: types.CodeType, path: str) -> str:
        """The source of a function, without its indentation."""
        try:
            if code.co_filename == "<string>":  # Python 3.13 has the text of `python -c` under this name, for any code
                raise OSError("it was made of a string")
            lines, first = inspect.findsource(code)
            if code.co_name == "<lambda>":
                return _lambda_source("".join(lines), code)
            return textwrap.dedent("".join(inspect.getblock(lines[first:])))
        except (OSError, TypeError, SyntaxError, LookupError) as error:
            raise ValueError(self._no_form(path, "is a function whose source cannot be read", str(error))) from error

    def _no_form(self, path: str, what: str, why: str) -> str:
        return (
            f"{self._label}: {path} {what}, and has no form by which a later session could tell whether the function "
            f"is the same ({why}); {_WAY_OUT}"
        )


def _hash(*parts: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d " % len(data) + data)
    return digest.digest()


def _check_light(value: Any, label: str, path: str) -> None:
    """ValueError for a value of a package that a worker must not import."""
    if isinstance(value, types.ModuleType):
        module = value.__name__
    else:
        named = value if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) else type(value)
        module = named.__module__
    what = "is the module" if isinstance(value, types.ModuleType) else "is of"
    _check_package(str(module), f"{path} {what}", label)


def _check_package(module: str, what: str, label: str) -> None:
    """ValueError for a module that a worker must not import. what: the beginning of what is said about it."""
    package = module.partition(".")[0]
    if package in _TOO_HEAVY:
        raise ValueError(
            f"{label}: {what} {module}, and a reward worker must not import {package}, which takes seconds and may "
            "take the devices; use numpy or plain Python, and convert what is captured, as in numpy.asarray(x)"
        )


def _is_importable(value: types.FunctionType | type) -> bool:
    """Whether a module other than the session's own holds it under its name, by cloudpickle's rules."""
    found: Any = sys.modules.get(value.__module__)
    if value.__module__ == "__main__" or found is None:
        return False
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _is_of_text(value: Any) -> bool:
    """Whether a library generated the function from text, as dataclasses do."""
    function = inspect.unwrap(value) if isinstance(value, types.FunctionType) else value
    return isinstance(function, types.FunctionType) and function.__code__.co_filename.startswith("<string>")


def _global_names(code: types.CodeType) -> set[str]:
    """The global names that a function, or a function inside it, reads or writes."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in _GLOBAL_OPERATIONS}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _imported_names(code: types.CodeType) -> set[str]:
    """The modules that a function, or a function inside it, imports."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}
    return names.union(*(_imported_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _lambda_source(text: str, code: types.CodeType) -> str:
    """The source of a lambda in the text of its file. LookupError where it cannot be told from other lambdas
    beside it.
    """
    nodes = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno
    ]
    # The places of its instructions, without those that stand for no text.
    places = [
        ((line, start), (end_line, end))
        for line, end_line, start, end in code.co_positions()
        if None not in (line, end_line, start, end) and (line, start) != (end_line, end)
    ]
    around = [node for node in nodes if all(_is_around(node.body, *place) for place in places)]
    # Some versions give no place to the return of a constant.
    same = [node for node in nodes if isinstance(node.body, ast.Constant) and _same(node.body.value, code.co_consts)]
    candidates: Sequence[ast.Lambda] = around if places else same if len(nodes) > 1 else nodes
    if not candidates or (not places and len({ast.dump(node) for node in candidates}) > 1):
        raise LookupError(f"{len(nodes)} lambdas begin in line {code.co_firstlineno}; define it by def")
    found = max(candidates, key=lambda node: (node.body.lineno, node.body.col_offset))  # the innermost
    segment = ast.get_source_segment(text, found)
    assert segment is not None
    return segment


def _same(value: Any, constants: tuple[Any, ...]) -> bool:
    """Whether a constant is among others. 1 and 1.0 are different."""
    return any(type(other) is type(value) and other == value for other in constants)


def _is_around(node: ast.expr, start: tuple[Any, Any], end: tuple[Any, Any]) -> bool:
    return (node.lineno, node.col_offset) <= start and end <= (node.end_lineno or 0, node.end_col_offset or 0)
