"""Reward functions given as objects: what they are known by, and what reaches a worker."""

import functools
import itertools
import linecache
import re
import subprocess
import sys
import textwrap
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rl
from rewards.contract import RewardSpec
from rewards.objects import from_bytes, identity, to_bytes
from rewards.runner import RewardRunner
from tests.helpers.places import ROOT

NUMBERS = itertools.count()


def cell(text: str, **names) -> dict:
    """What a cell of a notebook defines, in a session that has `names` already."""
    text, filename = textwrap.dedent(text), f"<cell {next(NUMBERS)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    session = {"__name__": "__main__", **names}
    exec(compile(text, filename, "exec"), session)
    return session


def known_by(text: str, name: str = "reward", **names) -> str:
    return identity(cell(text, **names)[name], "reward 'it'")


PLAIN = "def reward(completion):\n    return helper(completion) + bonus\n"
HELPER = "def helper(text):\n    return table[text[:1]]\n"
BEFORE = f"table = {{'a': 1.0}}\nbonus = 0.5\n{HELPER}{PLAIN}"


def test_the_same_cell_in_another_session_is_the_same_function():
    assert known_by(BEFORE) == known_by("\n\nother = 3\n" + BEFORE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ bonus", "- bonus"),
        ("bonus = 0.5", "bonus = 0.25"),
        ("text[:1]", "text[:2]"),
        ("{'a': 1.0}", "{'a': 1}"),
        ("def reward(completion)", "def reward(completion, weight=1.0)"),
    ],
)
def test_another_source_value_or_helper_in_the_session_is_another_function(old, new):
    assert old in BEFORE
    assert known_by(BEFORE) != known_by(BEFORE.replace(old, new))


def test_what_a_function_does_not_reach_is_no_part_of_it():
    assert known_by(BEFORE) == known_by(BEFORE + "unused = [1]\ndef other():\n    return unused\n")


def closure(value):
    def reward(completion):
        return value

    return reward


@pytest.mark.parametrize("value", [2.0, [1], {"a": (1, None)}, {1, 2}, np.arange(3.0), re.compile("a"), "\ud800"])
def test_a_captured_value_is_part_of_a_closure(value):
    assert identity(closure(value), "it") == identity(closure(value), "it")
    assert identity(closure(value), "it") != identity(closure(1.0), "it")


def test_equal_values_are_the_same_whether_they_are_one_object_or_two():
    one = [1]
    assert identity(closure([one, one]), "it") == identity(closure([[1], [1]]), "it")


def test_each_of_two_lambdas_in_a_line_is_a_function_of_its_own():
    text = "first, reward = lambda completion: 1.0, lambda completion: 2.0\n"
    assert known_by(text) != known_by(text, "first")
    assert known_by(text) == known_by("reward = lambda completion: 2.0  # alone\n")
    inner = "reward = (lambda weight: lambda completion: weight)(3.0)\n"
    assert known_by(inner) == known_by(inner)
    assert known_by(inner) != known_by(inner.replace("3.0", "4.0"))


def test_functions_that_call_each_other_have_a_form():
    text = "def reward(completion):\n    return other(completion)\ndef other(completion):\n    return {}reward('')\n"
    assert known_by(text.format("")) == known_by(text.format(""))
    assert known_by(text.format("")) != known_by(text.format("-"))


CLASSES = """
    import dataclasses

    @dataclasses.dataclass
    class Scorer:
        weight: float = 1.0

        def __call__(self, completion):
            return self.weight * len(completion)

    reward = Scorer(2.0)
"""


def test_methods_fields_and_state_are_part_of_an_object_that_can_be_called():
    assert known_by(CLASSES) == known_by(CLASSES)
    for old, new in (("Scorer(2.0)", "Scorer(3.0)"), ("* len", "+ len"), ("float = 1.0", "float = 1.5")):
        assert known_by(CLASSES) != known_by(CLASSES.replace(old, new))


SCRIPT = """
import sys
from rewards.objects import identity

words = {"please", "thanks", "sorry"}

class Counter:
    names = frozenset({"x", "y", "z"})
    def count(self, text):
        return sum(text.count(word) for word in words)

def reward(completion, counter=Counter()):
    return counter.count(completion)

print(identity(reward, "it"))
"""


def test_the_hash_is_the_same_in_every_process(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environments = [{"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    command = [sys.executable, str(tmp_path / "script.py")]
    hashes = [subprocess.run(command, env=e, capture_output=True, check=True).stdout for e in environments]
    assert hashes[0] == hashes[1]
    assert len(hashes[0].strip()) == 64


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (threading.Lock(), "value is of type lock"),
        ([1, (number for number in [1])], re.escape("value[1] is of type generator")),
        ({"model": threading.Event()}, "lock"),
    ],
)
def test_what_has_no_stable_form_is_refused_by_name(value, named):
    with pytest.raises(ValueError, match=f"it: .*{named}.*; make it inside the function"):
        identity(closure(value), "it")


def test_a_function_without_a_source_is_refused():
    session = {"__name__": "__main__"}
    exec("def reward(completion):\n    return 1.0\n", session)
    with pytest.raises(ValueError, match="it: reward is a function whose source cannot be read"):
        identity(session["reward"], "it")


@pytest.mark.parametrize(
    ("value", "package"), [(jnp, "jax"), (jnp.ones(2), "jax"), (jax.jit, "jax"), ({"run": rl}, "rl")]
)
def test_a_closure_that_drags_jax_along_is_refused(value, package):
    with pytest.raises(ValueError, match=f"it: value.* must not import {package}"):
        identity(closure(value), "it")
    with pytest.raises(ValueError, match=f"must not import {package}"):
        to_bytes(closure(value), "it")


def test_a_function_that_imports_jax_when_it_is_called_is_refused():
    session = cell("def reward(completion):\n    def inner():\n        import jax.numpy as jnp\n    return 1.0\n")
    with pytest.raises(ValueError, match=r"it: reward imports jax\.numpy, and a reward worker must not import jax"):
        identity(session["reward"], "it")


def test_an_annotation_that_drags_jax_along_is_refused():
    session = cell("def reward(completion: jax.Array):\n    return 1.0\n", jax=jax)
    with pytest.raises(ValueError, match="must not import jax"):
        to_bytes(session["reward"], "it")


def test_what_cannot_be_pickled_is_refused():
    with pytest.raises(ValueError, match=r"it: it cannot be sent to a reward worker: .*lock"):
        to_bytes(closure(threading.Lock()), "it")


def test_bytes_that_need_a_module_which_is_not_there_are_refused_where_they_are_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "gone", types.ModuleType("gone"))
    data = to_bytes(cell("import gone\ndef reward(completion):\n    return gone\n")["reward"], "it")
    monkeypatch.delitem(sys.modules, "gone")
    with pytest.raises(ValueError, match="it: it does not load in a reward worker: ModuleNotFoundError"):
        from_bytes(data, "it")


def scored(function, completions, name="it"):
    spec = RewardSpec(name, f"<object {name}>", 1.0, {}, pickled=to_bytes(function, name))
    with RewardRunner([spec], [], 1, 20.0) as runner:
        result = runner.score(["p"] * len(completions), completions, {})
    return [row[0] for row in result.rewards], result.problems


def test_functions_closures_lambdas_and_objects_of_a_session_run_in_a_worker():
    session = cell(
        BEFORE
        + "import numpy\nreward2 = lambda completion: numpy.float32(bonus)\n"
        + textwrap.dedent(CLASSES).replace("reward = ", "scorer = ")
    )
    assert scored(session["reward"], ["ab", "b"])[0] == [1.5, None]
    assert scored(session["reward2"], ["ab"])[0] == [0.5]
    assert scored(session["scorer"], ["ab"])[0] == [4.0]
    assert scored(closure(3.0), ["ab"])[0] == [3.0]
    partial = functools.partial(lambda completion, length: float(len(completion) == length), length=2)
    assert scored(partial, ["ab", "b"])[0] == [1.0, 0.0]


def test_a_function_that_a_worker_cannot_take_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"reward 'it': the parameters .*name neither prompts/completions"):
        scored(lambda text: 1.0, ["a"])
