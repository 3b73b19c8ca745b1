"""Hostile input: strategies over the typed configuration and over files, and the loop that tries them.

`search` runs a fixed choice of examples, the same every time; with FUZZ_SECONDS in the environment (`make fuzz`) new
ones for as long.
"""

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import os
import pathlib
import random
import re
import signal
import time
import typing

import hypothesis
from hypothesis import strategies as st

from rl.algorithms.loss_types import LOSS_TYPES
from rl.config.ranges import LARGEST_FLOAT, LARGEST_INT, RANGES
from rl.config.sections import ESTIMATOR_NAMES, Config
from rl.errors import raised_by_tandem
from rl.models.attention_kernels import KERNELS
from rl.models.families import FAMILIES

HANG_SECONDS = 60  # of processor time, of one example
LONGEST_MESSAGE = 2500
# Names that a key takes, where its type is text.
NAMES = {
    "grpo.loss_type": tuple(LOSS_TYPES),
    "grpo.advantage_estimator": ESTIMATOR_NAMES,
    "model.attention": ("auto", *KERNELS),
    "model.arch.family": tuple(FAMILIES),
}
WORDS = re.compile(r"[a-z_0-9]+")

WORDS_OF_USERS = (
    *("", "a", "byte", "arithmetic", "answer", "prompt", "kind", "*", "*_proj", "*/kernel", "fsdp", "data", "tensor"),
    *("runs/a", "no/such/file", "x.jsonl", "x.py:f", "rewards.number:exact_number_flexible", "~nobody/x", "/dev/null"),
    *(
        "a\0b",
        "\x7f",
        "caf\u00e9",
        "\u2028",
        "{{",
        "%s",
        "null",
        "1e-6",
        "gs://bucket/x",
        "ftp://host/x",
        "tunix:",
        ".",
    ),
    *("a" * 300, "a/" * 2500, "/", "..", " ", "-1", "[", "\n"),
)
INTS = (0, 1, 2, 3, 4, 7, 8, 16, 100, -1, -2, 255, 256, 1000, 2**31 - 1, 2**31, 2**32, 2**63, 10**30)
FLOATS = (0.0, 1.0, 0.5, 0.1, 2.0, -1.0, 1e-6, 1e-40, 1e-320, 1e38, 3.5e38, 1e308, 0.99999999, -0.0, 50.0, 1e6, 5e6)
# In YAML's own words, in the place of any value.
RAW = (
    *(".nan", "-.inf", "1:30", "yes", "0o17", "017", "1_000", "0x1F", "2024-01-01", "~", "", "[", "{", "*a", "&a x"),
    *("!!int x", "!!python/name:os.system", "&a [*a]", "[" * 2000, "'", '"\\ud800"', '"\\0"', "1e999", "9" * 200, "<<"),
    *(
        "{a: 1, a: 2}",
        "{<<: 3}",
        "%",
        "@",
        "- a",
        "? a",
        "a: b: c",
        "\t",
        "\x00",
        "!!float 1:30",
        "[[[[]]]]",
        "{1: {}}",
    ),
)
JSON_VALUES = st.recursive(
    st.sampled_from([None, True, False, *INTS, *FLOATS, *WORDS_OF_USERS[:40], "1", "true", [], {}]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS_OF_USERS[:24]), inner, max_size=3)
    ),
    max_leaves=5,
)


class Hang(BaseException):
    """An example takes too long; not caught by what is tested."""


def search(check, strategy, examples, share=1.0):
    """Calls `check` with examples of the strategy.

    examples: how many, of a fixed choice. share: of FUZZ_SECONDS, where that is set, for examples drawn anew.
    """
    options = {
        "deadline": None,
        "database": None,
        "print_blob": True,
        "suppress_health_check": list(hypothesis.HealthCheck),
        "report_multiple_bugs": False,
    }

    def run(number, **more):
        @hypothesis.settings(max_examples=number, **options, **more)
        @hypothesis.given(strategy)
        def test(example):
            with watchdog(example):
                check(example)

        if seed is not None:
            test = hypothesis.seed(seed)(test)
        test()

    seconds, seed = os.environ.get("FUZZ_SECONDS"), None
    if seconds is None:
        run(examples, derandomize=True)
        return
    deadline, count = time.monotonic() + float(seconds) * share, 0
    while time.monotonic() < deadline:
        seed = random.randrange(2**32)
        run(200, derandomize=False)
        count += 200
    print(f"\n{check.__name__}: {count} examples", flush=True)


@contextlib.contextmanager
def watchdog(example):
    """Raises `Hang` where Python hangs; ends the process, with a traceback, where a library does.

    The limit is one of processor time, and ten times as much by the clock, for a busy machine is no hang.
    """

    start, ticks = time.process_time(), itertools.count(1)

    def ring(number, frame):
        if next(ticks) == 10 or time.process_time() - start > HANG_SECONDS:
            raise Hang(f"took more than {HANG_SECONDS} seconds: {example!r}")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS, HANG_SECONDS)
    faulthandler.dump_traceback_later(12 * HANG_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def refused_or_done(call, *names):
    """The result of a call; None where it refused its input as it must: a ValueError of Tandem's own that names a key
    of the configuration or one of `names`, and is short.
    """
    try:
        return call()
    except ValueError as caught:
        error = caught
    assert raised_by_tandem(error), f"not raised by Tandem: {error!r}"
    text = str(error)
    assert len(text) <= LONGEST_MESSAGE, f"a message of {len(text)} characters: {text[:500]}"
    named = LEAVES & {*WORDS.findall(text)} or re.match(r"(data|model) must be a mapping", text)
    assert named or any(name in text for name in names), f"names no key: {text}"
    return None


def schema(section=Config, prefix=""):
    """{dotted key: type} of every key."""
    found = {}
    for name, kind in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            found |= schema(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = kind
    return found


KEYS = schema()
# The words by which a message names a key; "name" and the like would stand in any.
LEAVES = {key.rpartition(".")[2] for key in KEYS} | {
    "override",
    "function",
    "weight",
    "elementwise",
    "lr_scale",
    "pattern",
}
LEAVES |= {part for key in KEYS for part in key.split(".")[:-1]}
LEAVES -= {"data", "name", "model", "prompt"}


def plausible(kind, key=""):
    """Values of a type of the schema."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if type(None) in arguments:
        inner = next(argument for argument in arguments if argument is not type(None))
        return st.none() | plausible(inner, key)
    if origin is list:
        return st.lists(plausible(arguments[0]), max_size=3)
    if origin is dict:
        keys = st.integers(-1, 300).map(str) if arguments[0] is int else st.sampled_from(WORDS_OF_USERS)
        return st.dictionaries(keys, plausible(arguments[1]), max_size=3)
    if dataclasses.is_dataclass(kind):
        fields = {name: plausible(field) for name, field in typing.get_type_hints(kind).items()}
        return st.fixed_dictionaries({}, optional=fields)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.sampled_from(INTS) | st.integers(0, 40)
    if kind is float:
        return st.sampled_from(FLOATS) | st.floats(0, 2)
    choices = NAMES.get(key, ())
    return st.sampled_from((*choices, *WORDS_OF_USERS)) if kind is str else JSON_VALUES


def within(key):
    """Numbers in the range of a key, the ends among them; of the right type for other keys."""
    if key not in RANGES:
        return plausible(KEYS[key], key)
    limits, is_int = RANGES[key], int in (KEYS[key], *typing.get_args(KEYS[key]))
    low = -2 if limits.low is None else limits.low
    high = limits.high if limits.high is not None else LARGEST_INT if is_int else LARGEST_FLOAT
    numbers = [low, low + 1, 1, 2, 3, 4, 8, 16, 100, high] if is_int else [low, low + 1e-6, 0.1, 0.5, 1.0, 2.0, high]
    return st.sampled_from([number for number in numbers if limits.contains(number)])


@st.composite
def overrides(draw, keys=tuple(KEYS), most=4, hostile=True):
    """A few `key=value` of the schema: right ones mostly, else of any type, or no YAML at all."""
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=most, unique=True))
    texts = []
    for key in chosen:
        kind = draw(st.integers(0, 9)) if hostile else draw(st.integers(0, 3))
        if kind < 3:
            value = draw(within(key))
        else:
            value = draw(plausible(KEYS[key], key)) if kind < 7 else draw(JSON_VALUES)
        text = draw(st.sampled_from(RAW)) if kind == 9 else json.dumps(value)
        texts.append(f"{key}={text}")
    return texts


@st.composite
def mutated(draw, original: bytes):
    """Bytes with a few places cut, doubled, or replaced."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        end = start + draw(st.sampled_from((0, 1, 2, 8, 64, 10**6)))
        piece = draw(
            st.sampled_from(
                (b"", b"\0", b"\xff", b"{", b"}", b"[", b'"', b":", b"*a", b"&a ", b"- ", b"\n", b"  ", b"-1")
            )
            | st.binary(max_size=4)
            | st.just(bytes(data[start:end]) * 2)
        )
        data[start:end] = piece[: 1 << 20]
    return bytes(data)


def paths_of(value, path=()):
    """Places in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from paths_of(inner, (*path, name))


@st.composite
def mutated_json(draw, original):
    """A JSON value with one to three places replaced, removed or added, as bytes; sometimes bytes that are no JSON."""
    if draw(st.integers(0, 9)) == 9:
        return draw(mutated(json.dumps(original).encode()))
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(paths_of(value))[:400]))
        new = draw(JSON_VALUES)
        if not path:
            value = new if draw(st.integers(0, 3)) == 0 else value
            continue
        parent = value
        for name in path[:-1]:
            parent = parent[name]
        action = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if action == "remove":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(WORDS_OF_USERS[:24]))] = new
        else:
            parent[path[-1]] = new
    return json.dumps(value).encode()


def snapshot(folder: pathlib.Path):
    """{path: content} of everything below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
