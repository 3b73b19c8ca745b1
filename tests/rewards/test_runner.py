"""The isolated reward runner: what user code may do without harming a step. Every test runs real worker processes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rewards.batch import COUNTS, Batch, BatchInputs, RewardResult, Share, merge_results, result_of
from rewards.contract import RewardSpec
from rewards.failed import FirstFailure
from rewards.gold import check_on_gold
from rewards.log import RewardLog
from rewards.moment import Moment
from rewards.probe import probes
from rewards.retrying import is_network_error, pause
from rewards.runner import RewardRunner
from rewards.worker_variables import check_memory_gb
from tests.helpers.places import ROOT


@pytest.fixture
def write(tmp_path):
    """Write a reward file; the result makes a spec of one of its functions."""

    def write_file(code: str):
        path = tmp_path / "my_rewards.py"
        modules = "os, sys, time" + ", asyncio" * ("asyncio" in code)  # which takes a worker as long as its start
        path.write_text(f"import {modules}\n" + textwrap.dedent(code))
        return lambda name, weight=1.0, **kwargs: RewardSpec(name, f"{path}:{name}", weight, kwargs)

    return write_file


def run(specs, completions, num_workers=2, timeout=5.0, columns=None, completion_ids=None, group_size=1, **options):
    columns = columns or {}
    with RewardRunner(specs, list(columns), num_workers, timeout, **options) as runner:
        return runner.score(["p"] * len(completions), completions, columns, completion_ids, group_size=group_size)


def column(result, position=0):
    return [row[position] for row in result.rewards]


def counts(**expected):
    return dict.fromkeys(COUNTS, 0) | expected


def is_running(pid: int) -> bool:
    """A dead process is a zombie without other threads: only then does its parent hear of the death."""
    try:
        is_zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not is_zombie or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.02)
    return condition()


# What a well-behaved function gets.

STYLES = """
    def batch(prompts, completions, answer, **kwargs):
        return [float(c == a) for c, a in zip(completions, answer)]

    def sample(completion, answer, offset): return len(completion) + offset

    def compute_score(data_source, solution_str, ground_truth, extra_info):
        return {"score": float(solution_str == ground_truth), "acc": 1}

    async def async_batch(completions, completion_ids, **kwargs):
        await asyncio.sleep(0.01)
        return [len(ids) for ids in completion_ids]

    async def async_sample(completion, state):
        await asyncio.sleep(0.02 / (1 + len(completion)))
        return state["answer"].count("a")
"""


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_style_gives_the_same_rewards_for_any_number_of_workers(write, num_workers):
    spec = write(STYLES)
    specs = [spec("batch"), spec("sample", offset=10), spec("compute_score"), spec("async_batch"), spec("async_sample")]
    completions = ["a", "bb", "", "aa", "c" * 50, "aab", "x"]
    answers = ["a", "b", "", "aa", "", "aab", "y"]
    ids = [[1] * n for n in (3, 1, 0, 2, 9, 4, 5)]
    result = run(specs, completions, num_workers, columns={"answer": answers, "unused": [0] * 7}, completion_ids=ids)
    equal = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert column(result, 0) == equal
    assert column(result, 1) == [11, 12, 10, 12, 60, 13, 11]
    assert column(result, 2) == equal
    assert column(result, 3) == [3, 1, 0, 2, 9, 4, 5]
    assert column(result, 4) == [1, 0, 0, 2, 0, 2, 0]
    assert result.counts == {spec.name: counts() for spec in specs}
    assert result.problems == []
    assert set(result.effort) == {spec.name for spec in specs}
    for effort in result.effort.values():
        assert effort.completions == len(result.rewards)
        assert 0 < effort.mean <= effort.slowest < effort.seconds
        assert effort.retries == 0


def test_batch_function_sees_the_whole_batch_in_one_process_at_every_step(write):
    spec = write("""
        calls = []
        def best(completions):
            calls.append(len(completions))
            longest = max(len(c) for c in completions)
            return [float(len(c) == longest) + 10 * len(calls) for c in completions]
    """)
    with RewardRunner([spec("best")], [], 3, 5.0) as runner:
        for step in (1, 2, 3):
            result = runner.score(["p"] * 5, ["a", "aaa", "aa", "aaa", ""], {})
            assert column(result) == [10 * step + value for value in (0, 1, 0, 1, 0)]


def test_elementwise_function_is_spread_over_the_workers(write):
    spec = write(f"""
        sys.path.insert(0, {str(ROOT)!r})
        from rewards.contract import elementwise
        @elementwise
        def pid(completions):
            time.sleep(0.05)
            return [os.getpid() + len(completions) / 10] * len(completions)
    """)
    pids = column(run([spec("pid")], ["c"] * 16, num_workers=2))
    assert len(set(pids)) == 2
    assert all(round(pid % 1, 3) == 0.1 for pid in pids)  # batches of one


def test_rewards_that_are_known_are_not_asked_for_and_count_as_if_they_were(write):
    spec = write("""
        asked = []
        def size(completion, log_metric):
            asked.append(completion)
            log_metric("asked", len(asked))
            return {"score": len(completion), "last": completion} if completion != "none" else 1 / 0
        def all_of(completions):
            return [0.0] * len(completions)
    """)
    completions, noted = ["a", "none", "ccc"], {}
    specs = [spec("size"), dataclasses.replace(spec("all_of", 0.0), calls="whole_batch")]
    with RewardRunner(specs, [], 1, 5.0) as runner:

        def score(known):
            def note(sample, name, result):
                noted[sample, name] = result

            with runner.begin(["p"] * 3, {}, note=note) as scoring:
                for sample, completion in enumerate(completions):
                    scoring.add([sample], [completion], known=[known(sample)])
                return scoring.result()

        first = score(lambda sample: {})
        assert sorted(noted) == [(0, "size"), (2, "size")], "neither a failure nor what the whole batch was called for"
        again = score(lambda sample: {"size": noted[sample, "size"]} if sample != 1 else {})
        third = score(lambda sample: {})
    assert column(again) == column(first) == [1.0, None, 3.0]
    assert third.sums["size"]["asked"] == [5.0 + 7.0, 2], "the second time there was one call"
    assert again.logged[2] == first.logged[2] == {"size": {"score": 3, "last": "ccc"}}
    assert again.counts["size"] == first.counts["size"] == counts(exception=1)
    assert again.sums["size"]["asked"] == [1.0 + 3.0, 2]
    assert again.effort["size"].completions == 3


def test_async_samples_run_at_the_same_time(write):
    spec = write("""
        running, everyone = [], None
        async def together(completion):
            global everyone
            everyone = everyone or asyncio.Event()
            running.append(1)
            if len(running) == 6:
                everyone.set()
            await everyone.wait()  # for ever, when called one after another
            return 1
    """)
    assert column(run([spec("together")], ["c"] * 6, num_workers=1, timeout=3.0)) == [1] * 6


def test_chat_messages_and_columns_arrive_unchanged(write):
    spec = write("""
        def seen(prompts, completions, row, image, **kwargs):
            assert prompts[0] == [{"role": "user", "content": "hi"}], prompts
            assert completions[0] == [{"role": "assistant", "content": "yo"}], completions
            assert row == [{"x": [1, 2], "y": None}] and image == [b"\\x00\\xff"], (row, image)
            return [1]
    """)
    columns = {"row": [{"x": np.array([1, 2]), "y": None}], "image": [b"\x00\xff"]}
    with RewardRunner([spec("seen")], list(columns), 1, 5.0) as runner:
        prompt, completion = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}]
        result = runner.score([prompt], [completion], columns)
    assert result.problems == []
    assert column(result) == [1]


def test_large_batch_passes_the_pipes(write):
    spec = write("def size(completion, **kwargs): return len(completion)")
    completions = ["x" * (10_000 + i) for i in range(300)]
    assert column(run([spec("size")], completions)) == [10_000 + i for i in range(300)]


def test_empty_batch_is_an_empty_result(write):
    spec = write("def f(completions): raise RuntimeError")
    with RewardRunner([spec("f")], [], 1, 5.0) as runner, runner.begin([], {}) as scoring:
        scoring.add([], [])
        result = scoring.result()
    assert (result.rewards, result.counts["f"], result.problems) == ([], counts(), [])
    batch = Batch(runner.specs, [], ["whole_batch"], [0], BatchInputs([], {}), 1, 5.0, 1)
    batch.add({})
    assert batch.take(0) is None


def test_worker_imports_neither_jax_nor_the_toolkit_nor_what_only_async_functions_need(write):
    spec = write(
        "def heavy(completion): return len({'jax', 'rl', 'numpy', 'sympy', 'async' + 'io'} & set(sys.modules))"
    )
    assert column(run([spec("heavy")], ["c"])) == [0]


def test_string_hashes_are_the_same_in_every_run(write, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    spec = write("def first(completion): return hash(completion) % 1000003")
    assert column(run([spec("first")], ["c", "d"])) == column(run([spec("first")], ["c", "d"]))


def test_modules_come_from_the_working_directory_and_its_rewards_folder_hides_nothing(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    (tmp_path / "local_reward_module.py").write_text("def f(completion): return 3\n")
    monkeypatch.chdir(tmp_path)
    assert column(run([RewardSpec("f", "local_reward_module:f", 1.0, {})], ["c"])) == [3]
    assert column(run([RewardSpec("f", "./local_reward_module.py:f", 1.0, {})], ["c"])) == [3]


# What a misbehaving function costs: the sample, never the step.

CULPRITS = """
    import ctypes, re
    def act(text):
        if text == "raise": raise KeyError("no such thing")
        if text == "exit": sys.exit(0)
        if text == "interrupt": raise KeyboardInterrupt
        if text == "quit": os._exit(0)
        if text == "segfault": ctypes.string_at(0)
        if text == "sleep": time.sleep(60)
        if text == "backtrack": re.match("(a+)+$", "a" * 60 + "b")
        return {"nan": float("nan"), "inf": -float("inf"), "str": "1.0", "list": [1.0], "huge": 10**400}.get(text, 1)
    def batch(prompts, completions, **kwargs): return [act(c) for c in completions]
    def sample(completion): return act(completion)
    async def async_batch(completions): return [act(c) for c in completions]
    async def async_sample(completion): return act(completion)
    batch.elementwise = async_batch.elementwise = True
"""
STYLE_NAMES = ["batch", "sample", "async_batch", "async_sample"]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("raise", "exception", "KeyError: 'no such thing' (my_rewards.py:"),
        ("exit", "exception", "SystemExit: 0"),
        ("interrupt", "exception", "KeyboardInterrupt"),
        ("quit", "crash", "died with exit code 0"),
        ("segfault", "crash", "died by signal 11"),
        ("nan", "not_a_number", "finite"),
        ("inf", "not_a_number", "finite"),
        ("str", "not_a_number", "'1.0'"),
        ("list", "not_a_number", "list [1.0]"),
        ("huge", "not_a_number", "int"),
    ],
)
def test_failure_is_isolated_to_its_sample_counted_and_shown(write, tmp_path, text, kind, message):
    spec = write(CULPRITS)
    completions = ["fine", "ok", text, "good", "well"]
    result = run([spec(name) for name in STYLE_NAMES], completions, log_path=tmp_path / "log")
    for position, name in enumerate(STYLE_NAMES):
        assert column(result, position) == [1, 1, None, 1, 1], name
        assert result.counts[name] == counts(**{kind: 1}), name
        shown = [problem for problem in result.problems if f"{name!r} sample 2: {kind}" in problem]
        assert len(shown) == 1, result.problems
        assert message in shown[0]


@pytest.mark.parametrize("text", ["sleep", "backtrack"])  # the second holds the interpreter lock in C code
def test_hang_is_isolated_to_its_sample(write, tmp_path, text):
    spec = write(CULPRITS)
    names = ["batch", "sample", "async_sample"]
    result = run([spec(name) for name in names], ["fine", text, "good"], 3, timeout=0.6, log_path=tmp_path / "log")
    for position, name in enumerate(names):
        assert column(result, position) == [1, None, 1], name
        assert result.counts[name] == counts(timeout=1), name
    assert "in act" in (tmp_path / "log").read_text()  # the stack at the time of the kill


def test_slow_async_sample_is_cancelled_and_the_others_are_kept(write):
    spec = write("""
        async def wait(completion):
            await asyncio.sleep(60 if completion == "slow" else 0.01)
            return os.getpid()
    """)
    with RewardRunner([spec("wait")], [], 1, 0.6) as runner:
        first = runner.score(["p"] * 3, ["a", "slow", "b"], {})
        second = runner.score(["p"] * 3, ["a", "slow", "b"], {})
    assert first.counts["wait"] == counts(timeout=1)
    assert column(first)[1] is None
    assert column(first)[0] == column(second)[0] is not None  # no process had to die


def test_several_culprits_of_different_kinds_are_each_counted(write, tmp_path):
    spec = write(CULPRITS)
    completions = ["quit", "a", "raise", "nan", "b", "sleep", "raise", "segfault"]
    result = run([spec("batch"), spec("sample")], completions, timeout=0.6, log_path=tmp_path / "log")
    for position, name in enumerate(["batch", "sample"]):
        assert column(result, position) == [None, 1, None, None, 1, None, None, None]
        assert result.counts[name] == counts(crash=2, exception=2, not_a_number=1, timeout=1)
    assert [line.count("; 1 more like it") for line in result.problems[-4:]] == [0, 1, 0, 0]
    assert "reward 'sample': 2 more" in result.problems


# How a function may be called.

COMPARING = """
    import random
    from rewards.contract import elementwise, needs_group
    def noted(name, completions):
        with open(f"{__file__}.{name}", "a") as file:
            file.write(f"{len(completions)}\\n")
        if "bad" in completions: raise RuntimeError("bad one")
        if "die" in completions: os._exit(3)
        if "few" in completions: return [1.0]
        return [float(len(c) == max(map(len, completions))) for c in completions]
    def batch_best(completions): return noted("batch_best", completions)
    @needs_group
    def group_best(completions, answer):
        return noted("group_best", completions)
    @elementwise
    def longest(completions): return noted("longest", completions)
"""


@pytest.mark.parametrize(("text", "kind"), [("bad", "exception"), ("die", "crash"), ("few", "wrong_length")])
def test_failed_call_costs_what_it_was_made_for_and_is_made_for_no_less(write, tmp_path, text, kind):
    spec = write(COMPARING)
    specs = [spec("batch_best"), spec("group_best"), spec("longest")]
    completions, answers = ["a", "bbb", "cc", text, "d", "e", "ff", "ff", "g"], ["1"] * 9
    with RewardRunner(specs, ["answer"], 2, 5.0) as runner:
        result = runner.score(["p"] * 9, completions, {"answer": answers}, group_size=3)
    whole, group, alone = (column(result, key) for key in range(3))
    assert whole == [None] * 9
    assert group == [0, 1, 0, None, None, None, 1, 1, 0]
    assert alone == [1, 1, 1, 1 if text == "few" else None, 1, 1, 1, 1, 1]
    assert result.counts["batch_best"] == counts(**{kind: 9})
    assert result.counts["group_best"] == counts(**{kind: 3})
    assert f"reward 'batch_best' the call with the whole batch: {kind}: " in result.problems[0]
    assert f"reward 'group_best' the call with group 1: {kind}: " in result.problems[1]
    assert "9 not judged" in result.problems[0]
    sizes = {name: (tmp_path / f"my_rewards.py.{name}").read_text().split() for name in ("batch_best", "group_best")}
    assert sizes == {"batch_best": ["9"], "group_best": ["3"] * 3}


def test_group_is_judged_when_it_is_whole_and_never_in_part(write, tmp_path):
    spec = write(COMPARING)
    log = tmp_path / "my_rewards.py.group_best"
    with RewardRunner([spec("group_best"), spec("longest")], ["answer"], 1, 5.0) as runner:
        with runner.begin(["p"] * 4, {"answer": ["1"] * 4}, group_size=2) as scoring:
            scoring.add([3, 0], ["aa", "b"])
            scoring.add([2], ["a"])
            assert wait_until(log.exists, 5.0)
            scoring.add([1], ["bb"])
            assert column(scoring.result()) == [0, 1, 0, 1]
        assert log.read_text().split() == ["2", "2"]
        with pytest.raises(ValueError, match=r"'group_best' compares the completions of a prompt.*leave it out"):
            runner.begin(["p"] * 4, {"answer": ["1"] * 4})
        with pytest.raises(ValueError, match="whole groups of 3, got 4"):
            runner.begin(["p"] * 4, {"answer": ["1"] * 4}, group_size=3)
        assert runner.elementwise == ["longest"]
        alone = runner.score(["p"] * 2, ["a", "b"], {"answer": ["1"] * 2}, names=runner.elementwise)
    assert alone.rewards == [[None, 1.0], [None, 1.0]]
    assert alone.counts["group_best"] == counts()


def test_start_up_check_settles_how_a_function_that_is_not_marked_is_called(write, monkeypatch):
    monkeypatch.setattr("rewards.runner._CHECK_SECONDS", 1.0)
    spec = write("""
        import random
        calls = []
        def alone(prompts, completions, answer, completion_ids):
            assert all(ids == list(c.encode()) for c, ids in zip(completions, completion_ids))
            calls.append(completions)
            return [float(a in c) if c else None for c, a in zip(completions, answer)]
        def shortest_right(completions, answer):
            lengths = [len(c) for c, a in zip(completions, answer) if a in c]
            return [float(a in c and len(c) == min(lengths)) for c, a in zip(completions, answer)]
        def counts(completions):
            calls.append(1)
            return [float(len(calls))] * len(completions)
        def chance(completions): return [random.random() for _ in completions]
        def needs_many(completions):
            mean = sum(map(len, completions)) / (len(completions) - 1)
            return [0.5] * len(completions)
        def sleeps(completions): time.sleep(60)
        def told_whole(completions): return [1.0] * len(completions)
        told_whole.elementwise = False
        def remembers(completions):
            return [float(len(calls))] * len(completions)
    """)
    rows = [("1+1=", {"answer": "2"}), ("2+3=", {"answer": "5"})]
    names = ["alone", "shortest_right", "counts", "chance", "needs_many", "sleeps", "told_whole", "remembers"]
    with RewardRunner([spec(name) for name in names], ["answer"], 2, 5.0, rows=rows) as runner:
        assert runner.elementwise[0] == "alone"
        assert runner.calls["told_whole"] == "whole_batch"
        *found, of_alone = runner.notes()
        notes = dict(zip(names[1:6] + names[7:], found, strict=True))
        assert of_alone.startswith("reward 'alone' is called for one completion at a time")
        for name, reason in (
            ("shortest_right", "gave other rewards"),
            ("counts", "gave other rewards"),
            ("chance", "gave other rewards"),
            ("needs_many", "ZeroDivisionError"),
            ("sleeps", "took longer than 1 s"),
        ):
            assert runner.calls[name] == "whole_batch"
            assert f"{name!r} is called with whole batches, for " in notes[name]
            assert reason in notes[name]
        # What the check did to the functions is gone with its workers.
        fresh = runner.score(["p"], ["c"], {"answer": ["2"]}, [[99]], names=["counts", "remembers"])
        assert fresh.rewards[0][2] == 1.0
        before = runner.calls
        runner.adopt({"alone": "whole_batch", "chance": "elementwise", "told_whole": "elementwise"})
        assert runner.calls == before | {"alone": "whole_batch"}


def test_a_function_is_elementwise_only_where_the_check_could_have_shown_that_it_compares(write):
    spec = write(r"""
        import re
        def best(prompts, completions, right):
            shortest = {}
            for p, c, r in zip(prompts, completions, right):
                if r:
                    shortest[p] = min(shortest.get(p, len(c)), len(c))
            places = zip(prompts, completions, right)
            return [(1.0 if len(c) == shortest[p] else 0.5) if r else 0.0 for p, c, r in places]
        def brevity_json(prompts, completions, solution):
            return best(prompts, completions, [f'{{"answer": "{s}"}}' in c for c, s in zip(completions, solution)])
        def brevity_boxed(prompts, completions, solution):
            return best(prompts, completions, [f"\\boxed{{{s}}}" in c for c, s in zip(completions, solution)])
        def brevity_unknown(prompts, completions, solution):
            return best(prompts, completions, [f"@@{s}@@" in c for c, s in zip(completions, solution)])
        def declines(completions): return [None] * len(completions)
        def one_wins(completions): return [float(c.startswith("# Let")) for c in completions]
        # What a first reward function looks like.
        def polite(prompts, completions, **columns):
            return [1.0 if "please" in str(completion) else 0.0 for completion in completions]
        def exact(completions, solution): return [float(c == s) for c, s in zip(completions, solution)]
        def tagged(completions, solution):
            found = [re.search("<answer>(.*?)</answer>", c, re.DOTALL) for c in completions]
            return [float(bool(f) and f[1].strip() == s) for f, s in zip(found, solution)]
        def layout(completions):
            lines = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
            return [0.5 if re.match(lines, c, re.DOTALL) else 0.0 for c in completions]
        def code(completions): return [float("```python" in c) for c in completions]
        def shouts(completions): return [float(c.isupper()) for c in completions]
        def on_topic(prompts, completions): return [float(p in c) for p, c in zip(prompts, completions)]
    """)
    differ, unseen = ["brevity_json", "brevity_boxed"], ["brevity_unknown", "declines", "one_wins"]
    alone = ["polite", "exact", "tagged", "layout", "code", "shouts", "on_topic"]
    rows = [("What is it?", {"level": 3, "solution": "11"}), ("And now?", {"level": 4, "solution": "22"})]
    specs = [spec(name) for name in [*differ, *unseen, *alone]]
    with RewardRunner(specs, ["level", "solution"], 2, 5.0, rows=rows) as runner:
        assert runner.elementwise == alone
        for name in differ:
            assert "gave other rewards" in runner.why_not_alone(name)
        for name in unseen:
            assert "does not show whether it compares" in runner.why_not_alone(name)
            note = next(note for note in runner.notes() if repr(name) in note)
            assert "is called with whole batches, for " in note
            assert "elementwise: true says that it judges each completion by itself" in note
        completions = ['{"answer": "11"}', 'so {"answer": "11"}', "no", ""]
        result = runner.score(
            ["p"] * 4, completions, {"level": [3] * 4, "solution": ["11"] * 4}, group_size=4, names=["brevity_json"]
        )
    assert column(result) == [1.0, 0.5, 0.0, 0.0]


def test_the_check_finds_the_right_answer_in_the_columns_of_usual_data_sets():
    for columns in (
        {"ANSWER": "6 * 7 = 42\n#### 42"},  # GSM8K
        {"level": 5, "solution": r"So it is $\boxed{42}$."},  # MATH
        {"data_source": "x", "reward_model": {"style": "rule", "ground_truth": "42"}},  # verl
        {"id": None, "answers": ["42", "forty-two"]},
    ):
        row = ([{"role": "user", "content": "6*7?"}], columns)
        for probe in probes([row], [*columns]):
            texts = [messages[0]["content"] for messages in probe.completions]
            assert len(texts) == len(probe.prompts) == 2 * probe.group_size
            assert probe.columns == {name: [value] * len(texts) for name, value in columns.items()}
            assert "<answer>42</answer>" in "".join(texts).replace("\n", "")
            assert any(text.strip("$*#. \n").endswith("42") for text in texts)
    assert any(text == "6*7?" for text in probes([("6*7?", {})], [])[1].completions)


def test_what_the_recipe_says_wins_over_marks_and_check(write):
    spec = write("""
        def f(completions): return [float(len(completions))] * len(completions)
        def each(completion): return 1.0
        def both(completions): ...
        both.elementwise = both.needs_group = True
    """)
    function, rows = spec("f").function, [("p", {})]
    said = [RewardSpec(calls, function, 1.0, {}, calls) for calls in ("elementwise", "needs_group", "whole_batch")]
    with RewardRunner(said, [], 1, 5.0, rows=rows) as runner:
        assert list(runner.calls.values()) == ["elementwise", "needs_group", "whole_batch"]
        assert runner.notes() == []
        assert runner.score(["p"] * 4, ["c"] * 4, {}, group_size=2).rewards == [[1.0, 2.0, 4.0]] * 4
    for refused, message in (
        (RewardSpec("each", spec("each").function, 1.0, {}, "needs_group"), "one completion a call .*needs_group says"),
        (RewardSpec("each", spec("each").function, 1.0, {}, "whole_batch"), "elementwise: false says"),
        (spec("both"), "elementwise and needs_group"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardRunner([refused], [], 1, 5.0)


@pytest.mark.parametrize("value", ["None", "0.5", "'ab'", "{0: 1.0, 1: 2.0}"])
def test_batch_function_that_returns_no_list_is_a_wrong_length(write, value):
    spec = write(f"def f(completions): return {value}")
    result = run([spec("f")], ["a", "b"])
    assert column(result) == [None, None]
    assert result.counts["f"] == counts(wrong_length=2)


def test_whatever_has_a_float_is_a_reward(write):
    spec = write("""
        import numpy as np
        from decimal import Decimal
        values = [True, 2, np.float32(0.5), np.int64(3), Decimal("0.25"), np.array(4.0), None, np.ones(1), np.bool_(1)]
        def sample(completion): return values[int(completion)]
        def array(completions): return np.arange(len(completions))
    """)
    result = run([spec("sample"), spec("array")], [str(i) for i in range(9)])
    assert column(result, 0) == [1.0, 2.0, 0.5, 3.0, 0.25, 4.0, None, None, 1.0]
    assert result.counts["sample"] == counts(none=1, not_a_number=1)
    assert column(result, 1) == list(range(9))


def test_prints_and_reads_of_user_code_do_not_touch_the_protocol(write, tmp_path):
    spec = write("""
        print("hello from import")
        def loud(completion):
            print("hello from call", completion)
            sys.__stdout__.write("raw"); sys.__stdout__.flush()
            os.write(1, b"descriptor one\\n")
            os.system("echo from a shell")
            return len(sys.stdin.read())
    """)
    result = run([spec("loud")], ["c"], log_path=tmp_path / "log")
    assert column(result) == [0]
    log = (tmp_path / "log").read_text()
    for line in ("hello from import", "hello from call c", "raw", "descriptor one", "from a shell"):
        assert line in log


def test_log_of_a_function_that_prints_without_end_stays_within_two_files(write, tmp_path, monkeypatch):
    monkeypatch.setattr("rewards.log.MAX_BYTES", 100_000)
    spec = write("""
        def loud(completion):
            for number in range(10_000):
                print(f"{number:06d}", "x" * 92)  # 100 bytes
            return 1.0
    """)
    (tmp_path / "log").write_text("of an earlier run\n")
    assert column(run([spec("loud")], ["c"], log_path=tmp_path / "log")) == [1.0]
    new, old = ((tmp_path / name).read_text() for name in ("log", "log.1"))
    assert max(len(new), len(old)) <= 100_000 + 200
    first, _, rest = new.partition("\n")
    num_cut = int(re.fullmatch(r"\[this log goes on from log\.1; (\d+) bytes before that were cut\]", first)[1])
    notes = sum(len(line) + 1 for line in old.splitlines() if line.startswith("[this log"))
    assert "009999 xxx" in rest
    assert num_cut + len(old) - notes + len(rest) >= 1_000_000


def test_what_cannot_be_logged_is_counted_and_stops_nobody(tmp_path):
    log = RewardLog(tmp_path / "folder" / "log")
    os.write(log.descriptor, b"lost\n")
    assert wait_until(lambda: log._num_lost == 5, 5.0)
    (tmp_path / "folder").mkdir()
    os.write(log.descriptor, b"kept\n")
    log.close()
    log.close()
    text = (tmp_path / "folder" / "log").read_text()
    assert text == "[5 bytes of the log could not be written here]\nkept\n"


def test_the_log_follows_no_link(tmp_path):
    (tmp_path / "important").write_text("mine\n")
    (tmp_path / "log").symlink_to(tmp_path / "important")
    log = RewardLog(tmp_path / "log")
    os.write(log.descriptor, b"lost\n")
    assert wait_until(lambda: log._num_lost == 5, 5.0)
    log.close()
    assert (tmp_path / "important").read_text() == "mine\n"


def test_a_traceback_is_told_once_whichever_workers_meet_it(write, tmp_path, capfd):
    completions = ["raise"] * 4 + ["quit"] + ["raise"] * 7
    for log in (tmp_path / "log", None):
        result = run([write(CULPRITS)("sample")], completions, log_path=log)
        assert result.counts["sample"] == counts(exception=11, crash=1)
    for text in ((tmp_path / "log").read_text(), capfd.readouterr().err):
        assert text.count("Traceback") == text.count("KeyError: 'no such thing'\n") == 1


def test_the_place_of_an_error_is_the_users_own_line_also_inside_a_library(write):
    spec = write("""
        import json
        def parsed(completion):
            return json.loads(completion)["reward"]
        async def listed(completion):
            os.listdir(completion)
    """)
    result = run([spec("parsed"), spec("listed")], ["no JSON"])
    lines = [re.search(r"\((\w+\.py:\d+)\)$", problem) for problem in result.problems]
    assert [line and line[1] for line in lines] == ["my_rewards.py:5", "my_rewards.py:7"]


class Status:
    def __init__(self, status_code):
        self.status_code = status_code


FLAKY = """
    import urllib.error
    calls = []
    class Busy(Exception):
        status_code = 503
    Busy.__module__ = "openai._exceptions"
    class Wrong(Busy):
        status_code = 400
    Wrong.__module__ = "openai._exceptions"
    ERRORS = {"refused": ConnectionRefusedError(), "late": TimeoutError(), "busy": Busy(), "wrong": Wrong(),
              "http": urllib.error.HTTPError("u", 429, "", None, None), "no url": urllib.error.URLError("unknown"),
              "no host": urllib.error.URLError(OSError("gone")), "bug": KeyError("x"), "fine": None}
    def flaky(completion, log_metric):
        calls.append(completion)
        log_metric("calls", calls.count(completion))
        if calls.count(completion) < 3 and (error := ERRORS[completion]):
            raise error
        return calls.count(completion)
    async def flaky_async(completion, log_metric):
        return flaky(completion, log_metric)
    def flaky_batch(completions, log_metric):
        return [flaky(text, log_metric) for text in completions]
    flaky_batch.elementwise = False
    def never(completion):
        calls.append(completion)
        if completion == "fine":
            return len(calls)
        raise ConnectionError(len(calls))
"""


@pytest.mark.parametrize("name", ["flaky", "flaky_async"])
def test_calls_that_the_network_ended_are_made_again_and_others_are_not(write, name):
    texts = ["refused", "late", "busy", "http", "wrong", "no url", "bug", "fine"]
    result = run([write(FLAKY)(name)], texts, num_workers=1, retries=2, timeout=20.0)
    assert column(result) == [3.0] * 4 + [None] * 3 + [1.0]
    assert result.effort[name].retries == 8
    assert result.effort[name].completions == 8
    assert result.effort[name].slowest > 0.5  # pauses are part of it
    assert result.sums[name]["calls"] == [3.0 * 4 + 1, 5]  # what failed tries logged is dropped
    assert result.counts[name] == counts(exception=3)


def test_a_whole_call_is_made_again_within_its_limit_and_a_server_that_is_gone_is_waited_for_once(write):
    spec = write(FLAKY)
    result = run([spec("flaky_batch")], ["refused", "fine"], retries=2)
    assert column(result) == [3.0, 1.0]
    assert result.effort["flaky_batch"].retries == 2
    short = run([spec("flaky_batch")], ["refused", "fine"], retries=9, timeout=0.1)
    assert short.counts["flaky_batch"] == counts(exception=2)  # and not the time limit
    gone = run([spec("never")], ["a", "b", "c", "fine", "d"], num_workers=1, retries=1)
    assert column(gone) == [None, None, None, 5.0, None]  # calls: two, one, one, one, two
    assert gone.effort["never"].retries == 2
    assert [message.partition(" (")[0] for message in gone.failures["never"].values()] == [
        "exception: ConnectionError: 7"
    ]


@pytest.mark.parametrize(
    ("package", "name", "fields", "is_one"),
    [
        ("httpx", "ConnectTimeout:TimeoutException", {}, True),
        ("httpx", "UnsupportedProtocol:TransportError", {}, False),
        ("httpx", "HTTPStatusError", {"response": Status(503)}, True),
        ("requests.exceptions", "HTTPError", {"response": Status(404)}, False),
        ("requests.exceptions", "ConnectTimeout:Timeout", {"response": None}, True),
        ("aiohttp.client_exceptions", "ClientResponseError", {"status": 500}, True),
        ("aiohttp.client_exceptions", "ServerDisconnectedError:ClientConnectionError", {}, True),
        ("openai", "APITimeoutError:APIConnectionError", {}, True),
        ("openai", "RateLimitError", {"status_code": 429, "code": "rate"}, True),
        ("openai", "BadRequestError", {"status_code": 400}, False),
        ("mine", "APIConnectionError", {}, False),
        ("mine", "Failed", {"status_code": 503}, False),
    ],
)
def test_errors_of_the_network_are_known_by_the_names_of_their_classes(package, name, fields, is_one):
    kind: type = Exception
    for part in reversed(name.split(":")):
        kind = type(part, (kind,), {"__module__": package})
    error = kind("x")
    vars(error).update(fields)
    assert is_network_error(error) == is_one
    assert is_network_error(ExceptionGroup("of tasks", [error, ConnectionResetError()])) == is_one
    pauses = [pause(n) for n in range(8)]
    assert all(2.0**n / 4 <= seconds <= 2.0**n / 2 for n, seconds in enumerate(pauses[:6]))
    assert max(pauses) <= 30


FAILS_ONCE = """
    import json
    def parsed(completion):
        if completion == "hang":
            time.sleep(60)
        return float(json.loads(completion))
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", r"exception: .*JSONDecodeError.*\(my_rewards\.py:7\).*traceback:\n +Traceback .*\n +File .*json\.loads"),
        ("1e9", r"out_of_range: returned 1e\+09"),
        ("NaN", r"not_a_number: returned nan"),
        ("hang", r"timeout: no answer within 0\.6 s.*end of the log:.*my_rewards\.py\", line 6 in parsed"),
    ],
)
def test_with_on_error_raise_the_first_failure_ends_the_batch_and_is_told_in_full(write, tmp_path, text, words):
    options = {"on_error": "raise", "moment": Moment(7, 9), "log_path": tmp_path / "log"}
    with RewardRunner([write(FAILS_ONCE)("parsed", weight=0.0)], [], 1, 0.6, **options) as runner:
        assert runner.score(["p"], [text], {}).counts["parsed"] != counts()  # as the checks of the start do
        with runner.begin(["What?"] * 3, {}) as scoring:
            scoring.add([0, 1], ["1", text])
            assert wait_until(lambda: scoring._batch.first_failure is not None, 20.0)
            with pytest.raises(ValueError, match="'parsed' failed after 7 steps on sample 1 of its batch") as caught:
                scoring.add([2], ["2"])
        assert re.search(words, str(caught.value), re.DOTALL)
        assert f"prompt:\n    What?\ncompletion:\n    {text}" in str(caught.value)
        assert "worker.py" not in str(caught.value).partition("end of the log")[0]
        with runner.begin(["What?"] * 2, {}) as scoring:  # the workers are as good as before
            scoring.add([0, 1], ["1", "2"])
            assert column(scoring.result()) == [1.0, 2.0]


def test_processes_that_share_a_batch_all_raise_the_first_failure(write):
    """The second half is judged elsewhere: what was gathered says that it failed."""
    spec = write(FAILS_ONCE)("parsed")

    def gather(result):
        failed = FirstFailure("parsed", 3, "sample 3 of its batch", "crash", "died", "p", "c", "", 2)
        other = dataclasses.replace(result, first_failure=failed)
        return [result_of(json.loads(json.dumps(dataclasses.asdict(part)))) for part in (result, other)]

    with RewardRunner([spec], [], 1, 5.0, share=Share(0, 2, gather), on_error="raise") as runner:
        for first, place in (("1", 3), ("[", 0)):
            with runner.begin(["p"] * 4, {}) as scoring:
                scoring.add([0], [first])
                assert first == "1" or wait_until(lambda batch=scoring._batch: batch.first_failure is not None, 20.0)
                scoring.add([1, 2, 3], ["1", "2", "3"])  # nobody raises alone, for the others would wait for ever
                with pytest.raises(ValueError, match=f"on sample {place} of its batch"):
                    scoring.result()


def test_processes_started_by_a_hung_function_die_with_it(write, tmp_path):
    spec = write(f"""
        import subprocess
        def hang(completion):
            child = subprocess.Popen(["sleep", "60"])
            open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
            child.wait()
    """)
    result = run([spec("hang")], ["c"], timeout=0.4)
    assert result.counts["hang"] == counts(timeout=1)
    child = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not is_running(child), 5.0)


HOSTILE = """
    import gc, json, math, struct, threading
    import numpy as np
    json.dumps = json.JSONEncoder.encode = lambda *args, **kwargs: "{"
    math.isfinite = lambda value: True
    def pipe():
        return next(thing for thing in gc.get_objects() if type(thing).__name__ == "_Worker")
    def raw(data):
        os.write(pipe()._replies.fileno(), data)
        time.sleep(30)  # nothing but the forged frame may end the wait
    def frame(text):
        raw(struct.pack(">Q", len(text)) + text.encode())
    def reply(**fields):
        pipe()._reply(**fields)
        time.sleep(30)
    def result(index, value, **fields):
        fields = {"logged": {}, "sums": {}, "seconds": 0.0, "retries": 0, "trace": ""} | fields
        reply(op="result", index=index, value=value, kind=None, message=None, **fields)
    ACTS = {
        "1e6": lambda: 1e6, "1e200": lambda: 1e200, "over": lambda: -1000001, "nan": lambda: math.nan,
        "str": lambda: np.str_("1.5"), "bytes": lambda: np.bytes_(b"1.5"), "text array": lambda: np.array("1.5"),
        "complex": lambda: 1j, "complex64": lambda: np.complex64(1.5), "delta": lambda: np.timedelta64(1),
        "long": lambda: exec("raise ValueError('x' * 50_000_000)"),
        "escape": lambda: exec("raise ValueError(chr(27) + '[2J' + chr(10) + 'next')"),
        "log": lambda: result(0, 1.0, logged={"a": "x" * 50_000}),
        "sums": lambda: result(0, 1.0, sums={"a": [1.0, -1]}),
        "index": lambda: result(99, 1.0),
        "early done": lambda: reply(op="done", kind=None, message=None, seconds=0.0, retries=0, trace=""),
        "garbage": lambda: raw(b"x" * 100), "deep": lambda: frame("[" * 500_000),
        "NaN": lambda: frame('{"value": NaN}'), "digits": lambda: frame("1" * 500_000),
    }
    def act(completion):
        return ACTS[completion]()
"""


def test_whatever_a_function_returns_or_writes_costs_its_sample_alone(write, tmp_path):
    invalid = {
        **dict.fromkeys(("1e200", "over"), ("out_of_range", "must be within 1e+06 of 0")),
        **dict.fromkeys(("str", "bytes", "text array", "complex", "complex64", "delta"), ("not_a_number", "must be a")),
        "nan": ("not_a_number", "returned nan"),
        "long": ("exception", "more characters were cut) (<string>:1)"),
        "escape": ("exception", r"\x1b[2J\nnext"),
        **dict.fromkeys(("log", "sums"), ("crash", "sent logged values that are none")),
        "index": ("crash", "sent a reward for sample 99 of"),
        "early done": ("crash", "sent the end of a task with "),
        "garbage": ("crash", f"sent a message of {int.from_bytes(b'x' * 8)} bytes, over the limit"),
        "deep": ("crash", "sent what is no JSON (RecursionError"),
        "NaN": ("crash", "NaN is no number"),
        "digits": ("crash", "sent what is no JSON (ValueError"),
    }
    with RewardRunner([write(HOSTILE)("act")], [], 2, 5.0, log_path=tmp_path / "log") as runner:
        for completion, (kind, message) in invalid.items():  # a call each: only the first few problems are shown
            result = runner.score(["p"] * 2, [completion, "1e6"], {})
            assert column(result) == [None, 1e6], completion
            assert result.counts["act"] == counts(**{kind: 1}), completion
            assert message in result.problems[0]
            assert len(result.problems[0]) < 4200
            assert result.problems[0].isprintable()


def test_what_a_function_says_without_being_asked_is_never_taken_for_a_reply(write):
    spec = write("""
        import gc, threading
        def act(completion):
            worker = next(thing for thing in gc.get_objects() if type(thing).__name__ == "_Worker")
            nonce = worker._nonce
            def late():
                while worker._nonce == nonce and completion == "next task":
                    time.sleep(0.001)
                worker._nonce = nonce
                worker._reply(op="result", index=0, value=9.0, kind=None, message=None)
                open(__file__ + completion, "w").close()
            if completion in ("next task", "idle"):
                threading.Timer(0.05, late).start()
            if completion == "wait":
                time.sleep(30)
            return os.getpid()
    """)
    with RewardRunner([spec("act")], [], 1, 5.0) as runner:
        (first,) = column(runner.score(["p"], ["idle"], {}))
        assert wait_until(Path(spec("act").function.partition(":")[0] + "idle").exists, 5.0)
        (second,) = column(runner.score(["p"], ["next task"], {}))
        assert second not in (None, first)  # replaced before it was asked again
        result = runner.score(["p"], ["wait"], {})
        assert result.rewards == [[None]]
        assert "sent a reply to something else than it was asked" in result.problems[0]


def test_crash_is_seen_although_a_forked_child_holds_the_pipe(write):
    spec = write("""
        def orphan(completion):
            if completion == "bad":
                if os.fork() == 0:
                    time.sleep(30)
                os._exit(3)
            return 1
    """)
    result = run([spec("orphan")], ["a", "bad", "b"], timeout=20.0)
    assert column(result) == [1, None, 1]
    assert result.counts["orphan"] == counts(crash=1)


def test_function_that_cannot_be_loaded_again_after_a_crash_loses_samples_not_the_step(write, tmp_path):
    spec = write(CULPRITS)
    with RewardRunner([spec("sample")], [], 1, 5.0) as runner:
        write("def sample(:")
        result = runner.score(["p"] * 8, ["a", "quit", "b", "c", "d", "e", "f", "g"], {})
        assert column(result)[:2] == [1, None]
        assert result.counts["sample"]["crash"] == 1
        assert result.counts["sample"]["exception"] == 6
        assert any("does not import: SyntaxError" in problem for problem in result.problems)
        write(CULPRITS)
        assert column(runner.score(["p"], ["a"], {})) == [1]


def test_worker_that_dies_between_steps_is_replaced(write):
    spec = write("def pid(completions): return [os.getpid()]")
    with RewardRunner([spec("pid")], [], 1, 5.0) as runner:
        pid = int(column(runner.score(["p"], ["a"], {}))[0])
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not is_running(pid), 5.0)
        result = runner.score(["p"], ["a"], {})
    assert result.problems == []
    assert column(result)[0] not in (None, pid)


def test_interrupted_score_does_not_leak_into_the_next_one(write):
    spec = write("""
        def slow(completions):
            time.sleep(0.5)
            return [len(c) for c in completions]
    """)

    class Interrupted(Exception):
        pass

    def interrupt(number, frame):
        raise Interrupted

    with RewardRunner([spec("slow")], [], 1, 5.0) as runner:
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.15)
            with pytest.raises(Interrupted):
                runner.score(["p"] * 2, ["a", "bb"], {})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert column(runner.score(["p"], ["cccc"], {})) == [4]


# A batch whose completions come one by one.


def test_what_has_come_is_judged_while_the_rest_is_awaited(write, tmp_path):
    spec = write(f"""
        def seen(completion):
            open(f"{tmp_path}/seen_{{completion}}", "w").close()
            return float(len(completion))
        def whole(completions):
            open(f"{tmp_path}/whole_{{len(completions)}}", "w").close()
            return [float(len(completions))] * len(completions)
    """)
    with RewardRunner([spec("seen"), spec("whole")], [], 1, 5.0) as runner, runner.begin(["p"] * 3, {}) as scoring:
        for number, completion in ((2, "ccc"), (0, "a")):
            scoring.add([number], [completion])
            assert wait_until((tmp_path / f"seen_{completion}").exists, 5.0)
        assert not list(tmp_path.glob("whole_*"))
        scoring.add([1], ["bb"])
        assert scoring.result().rewards == [[1.0, 3.0], [2.0, 3.0], [3.0, 3.0]]
    assert [path.name for path in tmp_path.glob("whole_*")] == ["whole_3"]


def test_one_by_one_gives_what_all_at_once_gives(write):
    spec = write("""
        def each(completion, answer):
            if completion == "c3":
                raise RuntimeError("no")
            return float(completion == answer)
        async def later(completion):
            await asyncio.sleep(0.01)
            return None if completion == "c1" else 1.0
        def ranked(completions):
            return [float(sorted(completions).index(c)) for c in completions]
        def ids(completions, completion_ids):
            return [float(sum(ids)) for ids in completion_ids]
    """)
    specs = [spec("each"), spec("later"), spec("ranked"), spec("ids")]
    completions, answers = [f"c{i}" for i in range(7)], ["c0", "c1", "x", "c3", "c4", "x", "c6"]
    ids = [[i, 1] for i in range(7)]
    with RewardRunner(specs, ["answer"], 2, 5.0) as runner:
        at_once = runner.score(["p"] * 7, completions, {"answer": answers}, ids)
        with runner.begin(["p"] * 7, {"answer": answers}) as scoring:
            for number in (4, 1, 0, 6, 5, 3, 2):
                scoring.add([number], [completions[number]], [ids[number]])
            one_by_one = scoring.result()
    assert one_by_one.rewards == at_once.rewards
    assert one_by_one.counts == at_once.counts
    assert one_by_one.problems == at_once.problems
    assert at_once.counts["each"]["exception"] == 1


def test_a_batch_given_up_half_way_leaves_nothing_behind(write):
    spec = write("""
        def slow(completion):
            time.sleep(0.3)
            return float(len(completion))
    """)
    with RewardRunner([spec("slow")], [], 1, 5.0) as runner:
        with runner.begin(["p"] * 4, {}) as scoring:
            scoring.add([0, 1], ["a", "bb"])
        assert column(runner.score(["p"] * 2, ["ccc", "dddd"], {})) == [3, 4]


def test_completions_that_do_not_fit_the_batch_are_refused(write):
    spec = write("def length(completion): return float(len(completion))")
    with RewardRunner([spec("length")], [], 1, 5.0) as runner, runner.begin(["p"] * 2, {}) as scoring:
        scoring.add([0], ["a"])
        with pytest.raises(ValueError, match=r"sample 0 .*came before"):
            scoring.add([0], ["a"])
        with pytest.raises(ValueError, match="sample 2 is not in the batch of 2"):
            scoring.add([2], ["a"])
        with pytest.raises(ValueError, match=r"completions must have one entry per sample \(1\), got 2"):
            scoring.add([1], ["a", "b"])
        with pytest.raises(ValueError, match="1 of 2 completions are missing"):
            scoring.result()
        scoring.add([1], ["bb"])
        assert column(scoring.result()) == [1, 2]


# Life and death of the workers.


def test_ctrl_c_does_not_reach_a_worker(write):
    spec = write("def pid(completions): return [os.getpid()]")
    with RewardRunner([spec("pid")], [], 1, 5.0) as runner:
        pid = int(column(runner.score(["p"], ["a"], {}))[0])
        assert os.getsid(pid) == pid  # no terminal of ours sends it signals
        os.kill(pid, signal.SIGINT)
        assert column(runner.score(["p"], ["a"], {})) == [pid]


def test_close_ends_the_workers_and_lets_exit_handlers_run(write, tmp_path):
    spec = write(f"""
        import atexit
        atexit.register(lambda: open({str(tmp_path / "left")!r}, "w").write("properly"))
        def pid(completions): return [os.getpid()]
    """)
    runner = RewardRunner([spec("pid")], [], 1, 5.0)
    pid = int(column(runner.score(["p"], ["a"], {}))[0])
    runner.close()
    runner.close()
    assert not is_running(pid)
    assert (tmp_path / "left").read_text() == "properly"


# A process that leaves its session, whose parent is dead, that ignores what it can, and that holds none of our pipes.
DAEMON = """
    import signal
    def daemon(note):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)
                os.closerange(0, 256)
                with open(f"{note}.new", "w") as file:
                    file.write(str(os.getpid()))
                os.rename(f"{note}.new", note)
                time.sleep(600)
            os._exit(0)
        os.wait()
        while not os.path.exists(note):
            time.sleep(0.01)
"""


def read_pid(path: Path) -> int:
    return int(path.read_text())


def environment_of(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it died meanwhile, or is dying
        return b""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group can be ended")
@pytest.mark.parametrize("end", ["hang", "crash", "close"])
def test_what_a_worker_started_dies_with_it_also_outside_its_session(write, tmp_path, end):
    spec = write(
        DAEMON
        + f"""
    def start(completion):
        daemon({str(tmp_path / "daemon")!r})
        if completion == "hang": time.sleep(600)
        if completion == "crash": os._exit(1)
        return 1
    """
    )
    with RewardRunner([spec("start")], [], 1, 1.0) as runner:
        result = runner.score(["p"], [end], {})
        assert column(result) == [1 if end == "close" else None]
        assert is_running(read_pid(tmp_path / "daemon")) == (end == "close")
    assert not is_running(read_pid(tmp_path / "daemon"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group can be ended")
def test_processes_that_go_on_forking_are_all_ended(write, tmp_path, monkeypatch):
    # Eight chains of processes, each of which starts the next one and dies at once; the worker dies among them.
    spec = write(f"""
        def chains(completion):
            for number in range(8):
                if os.fork() == 0:
                    os.setsid()
                    deadline = time.monotonic() + 60
                    while time.monotonic() < deadline:
                        if os.fork() != 0:
                            os._exit(0)
                        with open(f"{tmp_path}/link{{number}}", "w") as file:
                            file.write(str(os.getpid()))
                    os._exit(0)
            while len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith("link")]) < 8:
                time.sleep(0.01)
            os._exit(1)
    """)
    monkeypatch.setenv("CHAINS_OF", str(tmp_path))
    result = run([spec("chains")], ["c"], 1, timeout=20.0, env=["CHAINS_OF"])
    assert result.counts["chains"] == counts(crash=1)
    assert len([*tmp_path.glob("link*")]) == 8
    mark = f"CHAINS_OF={tmp_path}".encode()
    assert not [number for number in filter(str.isdigit, os.listdir("/proc")) if mark in environment_of(number)]


def test_nothing_is_left_of_a_trainer_that_is_killed(write, tmp_path):
    is_linux = sys.platform == "linux"
    spec = write(
        DAEMON
        + f"""
    open(f"{tmp_path}/worker{{os.getpid()}}", "w").close()
    def idle(completion): return 1
    def busy(completions):
        if {is_linux}:
            daemon({str(tmp_path / "daemon")!r})
        print("busy", file=sys.stderr, flush=True)
        while True:
            pass
    """
    )
    code = f"""
        import os, time
        from rewards.contract import RewardSpec
        from rewards.runner import RewardRunner
        functions = {{"busy": {spec("busy").function!r}, "idle": {spec("idle").function!r}}}
        specs = [RewardSpec(name, function, 1.0, {{}}) for name, function in functions.items()]
        runner = RewardRunner(specs, [], 2, 60.0)
        if (fork := os.fork()) == 0:  # which holds all that the trainer holds
            os.setsid()
            time.sleep(60)
            os._exit(0)
        with open({str(tmp_path / "fork")!r}, "w") as file:
            file.write(str(fork))
        runner.score(["p"], ["c"], {{}})
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert parent.stderr is not None
    assert parent.stderr.readline() == "busy\n"
    parent.kill()
    parent.wait()
    parent.stderr.close()
    pids = [int(path.name.removeprefix("worker")) for path in tmp_path.glob("worker*")]
    assert len(pids) == 2
    pids += [read_pid(tmp_path / "daemon")] if is_linux else []
    assert wait_until(lambda: not any(is_running(pid) for pid in pids), 15.0)
    os.kill(read_pid(tmp_path / "fork"), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_cannot_get_rid_of_its_supervisor(write, tmp_path, number):
    spec = write(f"""
        def rebel(completion):
            with open({str(tmp_path / "pid")!r}, "w") as file:
                file.write(str(os.getpid()))
            if completion == "bad":
                os.kill(os.getppid(), {int(number)})
                time.sleep(600)
            return 1
    """)
    with RewardRunner([spec("rebel")], [], 1, 0.8) as runner:
        result = runner.score(["p"] * 3, ["a", "bad", "b"], {})
        assert column(result) == [1, None, 1]
        if number == signal.SIGKILL and sys.platform == "linux":
            assert "the supervisor of the worker process died by signal 9" in result.problems[0]
        else:
            assert "no answer within 0.8 s" in result.problems[0]
    assert not is_running(read_pid(tmp_path / "pid"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_processes_that_hold_more_memory_than_allowed_together_are_ended(write, tmp_path):
    spec = write("""
        def hoard(completion):
            if completion == "bad":
                for _ in range(3):
                    if os.fork() == 0:
                        os.setsid()
                        held = b"x" * 60_000_000
                        time.sleep(600)
                time.sleep(600)
            if completion == "greedy":
                return len(bytearray(1_000_000_000))
            return 1
    """)
    result = run([spec("hoard")], ["a", "bad", "greedy", "b"], 1, 20.0, memory_gb=0.15, log_path=tmp_path / "log")
    assert column(result) == [1, None, None, 1]
    assert result.counts["hoard"] == counts(crash=1, exception=1)
    assert re.search(r"held 0\.\d\d GB of memory together, more than rewards.memory_gb \(0.15\)", result.problems[0])
    assert "MemoryError" in result.problems[1]
    assert "allowed are 150000000" in (tmp_path / "log").read_text()


# What a worker sees of the environment.


def test_a_worker_sees_the_variables_it_needs_and_those_that_are_named(write, monkeypatch):
    for name, value in (("SECRET_TOKEN", "s"), ("JUDGE_KEY", "k"), ("LC_TIME", "C"), ("HF_HOME", "/hf"), ("TZ", "UTC")):
        monkeypatch.setenv(name, value)
    spec = write("""
        def names(completion): return 1 / 0 if set(os.environ) & {"SECRET_TOKEN"} else 1
        def seen(completion): return len([os.environ[n] for n in ("JUDGE_KEY", "LC_TIME", "HF_HOME", "TZ", "PATH")])
        def parent(completion): return float(b"SECRET_TOKEN" in open(f"/proc/{os.getppid()}/environ", "rb").read())
    """)
    specs = [spec("names"), spec("seen")] + ([spec("parent")] if sys.platform == "linux" else [])
    result = run(specs, ["c"], 1, env=["JUDGE_KEY"])
    assert result.problems == []
    assert result.rewards == [[1, 5, 0][: len(specs)]]


def test_a_variable_that_is_missing_in_the_worker_is_named_with_the_key_that_passes_it(write, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s")
    spec = write("""
        def plain(completion): return len(os.environ["SECRET_TOKEN"])
        def wrapped(completion):
            try:
                return len(os.environ["SECRET_TOKEN"])
            except KeyError:
                raise RuntimeError("no token")
        def other(completion): return {}["SECRET_TOKEN"]
    """)
    result = run([spec("plain"), spec("wrapped"), spec("other")], ["c"], 1)
    words = "the worker's environment does not hold SECRET_TOKEN: rewards.env: [SECRET_TOKEN] passes it"
    assert [words in problem for problem in result.problems] == [True, True, False]
    assert "(my_rewards.py:3)" in result.problems[0]  # and not a line of Python's own os
    spec = write("TOKEN = os.environ['SECRET_TOKEN']\ndef f(completion): return 1")
    with pytest.raises(ValueError, match=re.escape(words)):
        RewardRunner([spec("f")], [], 1, 5.0)


def test_a_variable_that_is_to_be_passed_must_be_set_and_be_a_name(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    spec = RewardSpec("f", "rewards.number:exact_number_strict", 1.0, {})
    with pytest.raises(ValueError, match=r"rewards.env passes JUDGE_KEY .*holds no such variable"):
        RewardRunner([spec], [], 1, 5.0, env=["JUDGE_KEY"])
    with pytest.raises(ValueError, match=r"names of environment variables.*'JUDGE_KEY=\.\.\.'") as caught:
        RewardRunner([spec], [], 1, 5.0, env=["JUDGE_KEY=sk-123"])
    assert "sk-123" not in str(caught.value)


# Refusals at start.


def test_worker_that_dies_while_importing_at_the_start_is_started_again(write):
    spec = write("""
        if not os.path.exists(__file__ + ".tried"):
            open(__file__ + ".tried", "w").close()
            os._exit(3)
        def other(completion): return 2.0
        def f(completion): return 1.0
    """)
    assert run([spec("f"), spec("other")], ["c"], num_workers=1).rewards == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def other(completion): ...", ["'f'", "no attribute 'f'"]),
        ("f = 3", ["must be callable"]),
        ("import no_such_module_here", ["does not import", "no_such_module_here"]),
        ("def f(completion, anwser): ...", ["nothing provides", "'anwser'", "did you mean the column 'answer'"]),
        ("os._exit(3)", ["importing", "failed 3 times", "exit code 3"]),
        ("time.sleep(60)", ["importing", "no answer within 0.8 s"]),
    ],
)
def test_function_that_cannot_start_is_refused_before_the_run(write, code, words):
    spec, limit = write(code), 0.8 if "sleep" in code else 60.0  # a busy machine needs seconds to start a process
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        RewardRunner([spec("f")], ["answer"], 2, 5.0, start_timeout_seconds=limit)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("num_workers", "timeout", "word"),
    [(0, 1.0, "num_workers"), (1, 0.0, "timeout_seconds"), (1, float("nan"), "timeout")],
)
def test_senseless_settings_are_refused(num_workers, timeout, word):
    spec = RewardSpec("f", "rewards.number:exact_number_strict", 1.0, {})
    with pytest.raises(ValueError, match=word):
        RewardRunner([spec], ["answer"], num_workers, timeout)


@pytest.mark.parametrize("memory_gb", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_memory_limit_is_refused(memory_gb):
    with pytest.raises(ValueError, match=r"rewards.memory_gb must be > 0 and finite"):
        check_memory_gb(memory_gb)


def test_kwargs_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match=r"'f': kwargs.*object"):
        RewardRunner([RewardSpec("f", "rewards.format:format_regex", 1.0, {"pattern": object()})], [], 1, 1.0)


def test_inputs_that_do_not_fit_together_are_refused(write):
    spec = write("def f(completions, completion_ids, answer): return [1.0] * len(completions)")
    with RewardRunner([spec("f")], ["answer"], 1, 5.0) as runner:
        with pytest.raises(ValueError, match=r"prompts must have one entry per completion \(2\), got 1"):
            runner.score(["p"], ["a", "b"], {"answer": ["1", "2"]}, [[1], [2]])
        with pytest.raises(ValueError, match="answer must have one entry"):
            runner.score(["p"], ["a"], {"answer": ["1", "2"]}, [[1]])
        with pytest.raises(ValueError, match="got no 'answer'"):
            runner.score(["p"], ["a"], {}, [[1]])
        with pytest.raises(ValueError, match="requires completion_ids"):
            runner.score(["p"], ["a"], {"answer": ["1"]})
        with pytest.raises(ValueError, match=r"column 'answer'.*set"):
            runner.score(["p"], ["a"], {"answer": [{1}]}, [[1]])
        assert column(runner.score(["p"], ["a"], {"answer": ["1"]}, [[1]])) == [1.0]


# The start-up check, and the ready-made functions in a worker.


def test_gold_check_warns_of_what_fails_on_a_right_answer(write):
    spec = write("""
        def good(completion, answer): return float(completion == answer)
        def raises(completion): return 1 / 0
        def declines(completions, **kwargs): return [None] * len(completions)
        def text(completion): return "1"
        def hangs(completion): time.sleep(60)
        def blind(completion): return 0.5
        def blind_batch(completions): return [0.0] * len(completions)
        def boxed(completion, answer): return float(completion == f"{answer} is right.")
        def best(completions): return [float(len(c) == max(map(len, completions))) for c in completions]
        best.needs_group = True
        calls = []
        def counts_calls(completions):
            calls.append(1)
            return [len(calls)] * len(completions)
        counts_calls.elementwise = False
    """)
    names = ["good", "raises", "declines", "text", "hangs", "blind", "blind_batch", "boxed", "best", "counts_calls"]
    with RewardRunner([spec(name) for name in names], ["answer"], 2, 0.8) as runner:
        warnings = check_on_gold(runner, "6*7?", "42", {"answer": "42"})
        again = runner.score(["p"] * 2, ["a", "b"], {"answer": ["1"] * 2}, group_size=2, names=["counts_calls"])
    assert column(again, -1) == [1.0, 1.0]  # what a function remembers of the check is gone
    assert len(warnings) == 6
    for name, words in [
        ("raises", "failed on all of 12 completions, .*: exception: ZeroDivisionError: division by zero"),
        ("declines", "None"),
        ("text", "'1'"),
        ("hangs", "timeout"),
        ("blind", "gave 0.5 to all of 36 completions"),
        ("blind_batch", r"gave 0 to all of 36 completions, .*\(data\.columns\)$"),
    ]:
        assert sum(re.search(f"'{name}' .*{words}", warning) is not None for warning in warnings) == 1, warnings


def test_functions_that_take_a_chat_completion_for_text_are_named_with_its_form(write):
    spec = write("""
        import re
        def compares(completions, answer): return [float(a in c) for a, c in zip(answer, completions)]
        def searches(completion, answer): return float(bool(re.search(answer, completion)))
        def reads(completion, answer): return float(answer in completion[0]["content"])
        def compute_score(data_source, solution_str, ground_truth, extra_info): return float(solution_str == "no")
    """)
    specs = [spec(name) for name in ("compares", "searches", "reads", "compute_score")]
    chat, gold = [{"role": "user", "content": "6*7?"}], [{"role": "assistant", "content": "42"}]
    row = (chat, {"answer": "42"})
    with RewardRunner(specs, ["answer"], 1, 5.0, rows=[row]) as runner:
        compares, searches, verl = check_on_gold(runner, chat, gold, row[1])
        assert check_on_gold(runner, chat, gold, row[1], tries_others=False)[1:] == []
    form = "prompts are chats (data.chat), so a completion is a list of messages, not text: completion[0]['content']"
    assert "'compares' gave 0 to all" in compares
    assert compares.endswith(form)
    assert "'searches' failed on all of 12" in searches
    assert searches.endswith(form)
    assert "'compute_score' gave 0 to all" in verl
    assert "messages" not in verl  # verl's functions get text in any case
    with RewardRunner(specs[2:3], ["answer"], 1, 5.0) as runner:
        (warning,) = check_on_gold(runner, "6*7?", None, {"answer": "42"})
    assert "prompts are text, so a completion is text" in warning


def test_ready_made_functions_run_in_workers_and_a_hanging_expression_costs_its_sample():
    specs = [
        RewardSpec("strict", "rewards.number:exact_number_strict", 1.0, {}),
        RewardSpec("flexible", "rewards.number:exact_number_flexible", 0.0, {}),
        RewardSpec("math", "rewards.verify:math_verified", 1.0, {}),
        RewardSpec("format", "rewards.format:format_regex", 0.1, {"pattern": ".*boxed.*"}),
        RewardSpec("length", "rewards.length:length_penalty", 1.0, {"limit": 4, "buffer": 2}),
    ]
    completions = [r"\boxed{42}", "it is 42", r"\boxed{3^{3^{3^{3}}}}", r"\boxed{41}"]
    ids = [[1] * length for length in (2, 3, 5, 4)]
    result = run(specs, completions, timeout=3.0, columns={"answer": ["42"] * 4}, completion_ids=ids)
    assert column(result, 0) == [1.0, 0.0, 0.0, 0.0]
    assert column(result, 1) == [1.0, 1.0, 0.0, 0.0]
    assert column(result, 2) == [1.0, 1.0, None, 0.0]
    assert result.counts["math"] == counts(timeout=1)
    assert column(result, 3) == [1.0, 0.0, 1.0, 1.0]
    assert column(result, 4) == [0.0, -0.5, -1.0, -1.0]


# Several processes


def test_a_function_in_this_process_gets_the_whole_batch_in_each_and_its_failures_are_counted(write):
    spec = write("def length(completion):\n    return float(len(completion))\n")
    seen, completions = [], ["a", "ccc", "", "dddd"]

    def model(prompts, completions):
        seen.append((prompts, completions))
        return [0.5, float("nan"), ("exception", "too long"), 2e6]

    specs = [spec("length"), RewardSpec("model", "model:folder", 1.0, {})]
    share = Share(0, 2, lambda result: [result])
    with RewardRunner(specs, [], 1, 5.0, in_process={"model": model}, share=share) as runner:
        assert (runner.in_process, runner.elementwise) == (["model"], ["length", "model"])
        result = runner.score(["p"] * 4, completions, {}, group_size=2)
        assert seen == [(["p"] * 4, completions)]
        assert result.rewards == [[1.0, 0.5], [3.0, None], [None, None], [None, None]]  # the other half is another's
        assert result.counts["model"] == dict.fromkeys(COUNTS, 0) | dict.fromkeys(
            ("exception", "not_a_number", "out_of_range"), 1
        )
        assert result.problems[0] == "reward 'model' sample 1: not_a_number: gave nan"
        assert len(result.failures["model"]) == 3
        runner.score(["p"], ["a"], {}, names=["length"])
        check_on_gold(runner, "p", "a", {})
        assert len(seen) == 1


def test_shares_of_a_batch_are_disjoint_and_make_the_whole(write):
    spec = write("""
        def length(completion):
            return float(len(completion))
        def rank(prompts, completions):
            return [float(sorted(completions).index(text)) for text in completions]
        def top(prompts, completions):
            return [float(text == max(completions)) for text in completions]
        top.needs_group = True
        def last(prompts, completions):
            return [float(text == completions[-1]) for text in completions]
    """)
    specs = [spec("length"), spec("rank"), spec("top"), spec("last")]
    completions = ["a", "ccc", "bb", "dddd", "eeeee", "ffffff", "", "g"]
    whole = run(specs, completions, group_size=2)
    gathered = [Share(index, 3, lambda result: [result]) for index in range(3)]
    parts = [run(specs, completions, share=share, group_size=2) for share in gathered]
    judged = [[[b for b, row in enumerate(part.rewards) if row[k] is not None] for part in parts] for k in range(4)]
    assert judged[0] == [[0, 1, 2], [3, 4, 5], [6, 7]]  # blocks
    assert judged[2] == [[0, 1, 2, 3], [4, 5], [6, 7]]  # whole groups
    assert judged[1::2] == [[[], [*range(8)], []], [[*range(8)], [], []]]  # of the whole batch: functions in turns
    assert merge_results(parts).rewards == whole.rewards
    assert merge_results(parts).counts == whole.counts


PARTLY_COMPARING = """
    def log(name, completions):
        with open(f"{__file__}.{name}", "a") as file:
            file.write(f"{len(completions)} ")
    def mixed(completions, answer):
        log("mixed", completions)
        right = [c.endswith("RIGHT" + a) for c, a in zip(completions, answer)]
        return [0.1 * ("boxed" in c) + r / max(1, sum(right)) for c, r in zip(completions, right)]
    def many(completions):
        log("many", completions)
        longest = max(map(len, completions)) if len(completions) >= 30 else 1
        return [len(c) / max(1, longest) for c in completions]
    def alone(completions, answer):
        log("alone", completions)
        return [float(c.endswith("RIGHT" + a)) + 0.1 * ("boxed" in c) for c, a in zip(completions, answer)]
    def marked(completions):
        log("marked", completions)
        return [float(len(c)) for c in completions]
    marked.elementwise = True
    def fails(completions):
        if len(completions) > 1 and "trap" in completions:
            raise KeyError("trap")
        return [float("boxed" in c) for c in completions]
"""
ROWS = [("1+1=", {"answer": "2"}), ("2+3=", {"answer": "5"})]
RIGHT = ["RIGHT2", "so RIGHT2", "no", "boxed"]


def whole_calls(path: Path, name: str, size: int) -> int:
    """How often the function was called with so many completions at once; forgets what was before."""
    log = path / f"my_rewards.py.{name}"
    sizes = log.read_text().split()
    log.write_text("")
    return sizes.count(str(size))


def test_a_comparison_that_the_check_cannot_reach_shows_in_the_first_batch_that_does(write, tmp_path):
    spec = write(PARTLY_COMPARING)
    with RewardRunner([spec("alone"), spec("mixed")], ["answer"], 2, 5.0, rows=ROWS) as runner:
        assert runner.elementwise == ["alone", "mixed"]
        first = runner.score(["p"] * 4, ["no", "", "boxed", "x"], {"answer": ["2"] * 4}, group_size=4)
        assert (column(first, 1), first.problems) == ([0.0, 0.0, 0.1, 0.0], [])
        with runner.begin(["p"] * 4, {"answer": ["2"] * 4}, group_size=4) as scoring:
            scoring.add(range(4), RIGHT)
            found = scoring.result()
            assert scoring.result() == found
        assert column(found, 1) == [0.5, 0.5, 0.0, 0.1]
        assert column(found, 0) == [1.0, 1.0, 0.0, 0.1]
        (warning,) = found.problems
        assert "reward 'mixed' is called with whole batches, for in a batch of this run" in warning
        assert "in its entry of rewards.functions, elementwise: true" in warning
        assert runner.elementwise == ["alone"]
        assert warning in runner.notes()
        later = runner.score(["p"] * 4, RIGHT, {"answer": ["2"] * 4}, group_size=4)
        assert (later.rewards, later.problems) == (found.rewards, [])
    with RewardRunner([spec("many")], ["answer"], 1, 5.0, rows=ROWS) as runner:
        assert runner.elementwise == ["many"]
        texts = ["x" * (1 + i) for i in range(32)]
        result = runner.score(["p"] * 32, texts, {"answer": ["2"] * 32}, group_size=8)
        assert column(result) == [(1 + i) / 32 for i in range(32)]


def test_whole_calls_that_look_for_a_comparison_end_when_they_have_agreed(write, tmp_path):
    spec = write(PARTLY_COMPARING)
    with RewardRunner([spec("alone"), spec("marked")], ["answer"], 2, 5.0, rows=ROWS) as runner:

        def extra(texts: list[str], group_size: int = 4) -> int:
            runner.score(["p"] * len(texts), texts, {"answer": ["2"] * len(texts)}, group_size=group_size)
            return whole_calls(tmp_path, "alone", len(texts))

        whole_calls(tmp_path, "alone", 0)
        assert extra(RIGHT, group_size=1) == 0  # an evaluation: none has another beside it
        assert extra(["no", "", "x", "boxed"]) == 1
        assert extra(["no", "", "boxed", "boxed"]) == 1
        assert [extra(["no", "", "boxed", "boxed"]), extra(["no", "RIGHT2", "boxed", "boxed"])] == [0, 0]
        assert extra(RIGHT) == 1
        saved = runner.doubts
        assert extra(RIGHT) == 0
        assert saved == {"alone": {"left": 5, "highest": 1.0}}
        assert whole_calls(tmp_path, "marked", 4) == 0  # nothing said is doubted
    with RewardRunner([spec("alone")], ["answer"], 1, 5.0, rows=ROWS) as runner:
        whole_calls(tmp_path, "alone", 0)
        runner.adopt({"alone": "elementwise"}, saved)
        assert extra(RIGHT) == 0
        runner.adopt({"alone": "elementwise"}, {"alone": {"left": 0, "highest": None}})
        assert extra(["boxed RIGHT2"] * 4) == 0


def test_a_whole_call_that_fails_shows_nothing_and_costs_no_reward(write):
    spec = write(PARTLY_COMPARING)
    texts = ["trap", "boxed", "boxed", "no"]
    with RewardRunner([spec("fails")], ["answer"], 1, 5.0, rows=ROWS) as runner:
        result = runner.score(["p"] * 4, texts, {"answer": ["2"] * 4}, group_size=4)
        assert column(result) == [0.0, 1.0, 1.0, 0.0]
        assert result.counts["fails"] == counts()
        assert "KeyError" in result.problems[0]
        assert "made to see whether 'fails' compares completions" in result.problems[0]
        assert runner.doubts == {"fails": {"left": 7, "highest": None}}


def test_processes_that_share_a_batch_decide_alike_on_what_compares(write):
    spec = write(PARTLY_COMPARING)
    told: dict[int, list[RewardResult]] = {0: [], 1: []}
    meeting, lock = threading.Barrier(2), threading.Lock()

    def share(index: int) -> Share:
        def gather(result: RewardResult) -> list[RewardResult]:
            with lock:
                told[index].append(result)
            meeting.wait(60)
            return [told[0][len(told[index]) - 1], told[1][len(told[index]) - 1]]

        return Share(index, 2, gather)

    def process(index: int):
        specs = [spec("alone"), spec("mixed")]
        with RewardRunner(specs, ["answer"], 1, 5.0, rows=ROWS, share=share(index)) as runner:
            result = runner.score(["p"] * 4, RIGHT, {"answer": ["2"] * 4}, group_size=4)
            return result, runner.calls, runner.doubts

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert first == second
    assert column(first[0], 1) == [0.5, 0.5, 0.0, 0.1]
    assert first[1] == {"alone": "elementwise", "mixed": "whole_batch"}


def test_a_column_with_the_name_of_an_injected_value_wins_and_the_start_says_so(write):
    spec = write("""
        def judge(prompts, completions, data_completions):
            return [float(c == d) for c, d in zip(completions, data_completions)]
        def ids(completions, completion_ids): return [float(len(row)) for row in completion_ids]
        judge.elementwise = ids.elementwise = True
        def one(completion, state, seed): return float(completion == state["prompts"]) + seed
    """)
    names = ["completion_ids", "completions", "data_completions", "prompts", "state"]
    specs = [spec(name) for name in ("judge", "ids", "one")]
    with RewardRunner(specs, names, 1, 5.0) as runner:
        of_ids, of_completions, of_prompts, of_state = runner.notes()
        columns = {name: [name] * 2 for name in names} | {"completions": ["data_completions", "x"]}
        result = runner.score(["p"] * 2, ["c", "prompts"], columns, [[1], [1, 2]], seeds=[10, 20])
    assert "reward 'ids' gets the data set's column 'completion_ids' in place of the run's own value" in of_ids
    assert "reward 'judge', 'ids' gets the data set's column 'completions'" in of_completions
    assert "it judges the data set and not the policy, whatever is drawn" in of_completions
    assert of_completions.endswith("for example data.columns.data_completions=completions")
    assert of_prompts.startswith("reward 'judge' gets the data set's column 'prompts'")
    assert "judges the data set" not in of_prompts
    assert "column 'state' does not reach reward 'one': under that name it gets an object of the run" in of_state
    assert result.rewards == [[1.0, 14.0, 10.0], [0.0, 14.0, 21.0]]


INJECTED = """
    def one(completion, group, truncated, finish_reason, step, seed):
        seen = (group[seed % 2] == completion, truncated, finish_reason == "length", step == 7)
        return sum(float(value) * 10**place for place, value in enumerate(seen))
    async def later(prompt, completion, group, rewards_timeout_seconds, is_trial):
        return float(group.index(completion)) + rewards_timeout_seconds + 10 * is_trial
    def compute_score(solution_str, ground_truth, group, seed): return float(len(group)) + seed
    def lists(completions, group, truncated, finish_reason, step, seed, rewards_timeout_seconds):
        assert rewards_timeout_seconds == 5.0
        sizes.append(len(completions))
        same = [(g[s % 2] == c, t, f == "length", step == 7)
                for c, g, t, f, s in zip(completions, group, truncated, finish_reason, seed, strict=True)]
        group[0].clear()  # each list is its sample's own
        return [sum(float(value) * 10**place for place, value in enumerate(seen)) for seen in same]
    sizes = []
    def whole(completions, group): return [float(len(completions)) + len(g) for g in group]
    whole.elementwise = False
    def numbers(completions, truncated, **columns): return [float(t) + len(columns) for t in truncated]
"""


def test_values_of_the_run_reach_the_functions_that_spell_them_out(write):
    spec = write(INJECTED)
    specs = [spec(name) for name in ("one", "later", "compute_score", "lists", "whole", "numbers")]
    completions, reasons = ["a", "b", "c", "d"], ["eos", "length", "stop", "length"]
    moment = Moment(7, 9, 0.5)
    with RewardRunner(specs, ["answer"], 2, 5.0, rows=[("p", {"answer": "x"}), ("q", {"answer": "y"})]) as runner:
        grouped = dict.fromkeys(("one", "later", "compute_score", "lists"), "needs_group")
        assert runner.calls == {**grouped, "whole": "whole_batch", "numbers": "whole_batch"}
        assert runner.why_not_alone("one") == "it takes `group`, the completions of the same prompt"
        columns = {"answer": ["x"] * 4}
        with runner.begin(["p", "p", "q", "q"], columns, group_size=2, moment=moment) as scoring:
            for b in (3, 0, 2, 1):  # no group is whole before the third
                scoring.add([b], [completions[b]], [[b]], [reasons[b]])
            result = scoring.result()
        tried = runner.score(["p"] * 2, ["a", "b"], {"answer": ["x"] * 2}, group_size=2, names=["later"], is_trial=True)
        with pytest.raises(ValueError, match=r"'one' compares the completions of a prompt"):
            runner.score(["p"], ["a"], {"answer": ["x"]})
    seen = [1001.0, 1111.0, 1001.0, 1111.0]
    assert column(result, 0) == seen
    assert column(result, 1) == [5.0, 6.0, 5.0, 6.0]
    assert column(tried, 1) == [15.0, 16.0]
    assert column(result, 2) == [2.0, 3.0, 4.0, 5.0]
    assert column(result, 3) == seen
    assert column(result, 4) == [6.0] * 4
    assert [value - column(result, 5)[0] for value in column(result, 5)] == [0.0, 1.0, 0.0, 1.0]
    assert result.problems == []


LOGGING = """
    def trl(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **columns):
        right = [float(c == a) for c, a in zip(completions, answer)]
        log_extra("length", [len(c) for c in completions])
        log_extra("said", completions)
        log_metric("right", sum(right) / len(right))
        done = trainer_state.global_step / trainer_state.max_steps + trainer_state.epoch
        return [r + done for r in right]
    async def through_kwargs(completions, answer, **kwargs):
        await asyncio.sleep(0.01)
        for c in completions:  # in pieces, as TRL allows
            kwargs["log_extra"]("said", [c])
        kwargs["log_metric"]("calls", len(completions))
        return [None] * len(completions)
    def group(completions, log_metric):
        log_metric("size", len(completions))
        return [float(len(completions))] * len(completions)
    group.needs_group = True
    def alone(completion, log_metric, log_extra):
        log_metric("length", len(completion))
        log_extra("said", [completion])
        if completion == "bad": raise KeyError(completion)
        return 0.5
    async def compute_score(data_source, solution_str, ground_truth, extra_info):
        await asyncio.sleep(0.01 / (1 + len(solution_str)))
        return {"score": float(solution_str == ground_truth), "acc": solution_str == ground_truth, "pred": solution_str}
    from array import array  # which has a tolist, as tensors have
    def reward_func(queries, prompts, labels):
        right = [float(q == p + l) for q, p, l in zip(queries, prompts, labels)]
        logs = {"length": array("i", [len(queries[0])]), "said": queries}
        return {"rewards": array("d", right), "scores": array("d", [2 * value for value in right]), "extra_logs": logs}
    def no_score(solution_str, ground_truth): return {"acc": 1.0}
    def short(completions, log_extra):
        log_extra("x", [1])
        return [0.0] * len(completions)
    short.elementwise = False
    def no_number(completion, log_metric): log_metric("x", "y")
    def many(completion, log_metric, seed):
        for number in range(40): log_metric(f"{seed} {number}", 1)
        return 0.0
"""
SAID = ["a", "bb", "bad", "dddd"]


@pytest.mark.parametrize("share", [1, 2])
def test_what_functions_log_comes_with_the_result_however_they_are_called(write, share):
    spec = write(LOGGING)
    names = [
        "trl",
        "through_kwargs",
        "group",
        "alone",
        "compute_score",
        "no_score",
        "short",
        "many",
        "reward_func",
        "no_number",
    ]
    specs = [spec(name) for name in names]
    if share > 1:  # said, because a share alone cannot be compared with a call for the whole batch
        specs[0] = dataclasses.replace(specs[0], calls="elementwise")
    columns = {"answer": ["a", "b", "bad", "x"]}
    parts = []
    for index in range(share):
        part = None if share == 1 else Share(index, share, lambda result: [result])
        rows = [("p", {"answer": "a"}), ("q", {"answer": "b"})]
        with RewardRunner(specs, ["answer"], 2, 5.0, rows=rows, share=part, moment=Moment(0, 8, 0.0)) as runner:
            assert runner.elementwise[0] == "trl"  # the check called it in both ways
            options = {"group_size": 2, "moment": Moment(2, 8, 0.5)}
            parts.append(runner.score(["p"] * 4, SAID, columns, [[1]] * 4, **options))
    sent = [json.loads(json.dumps(dataclasses.asdict(part))) for part in parts]  # as processes gather them
    result = merge_results([result_of(part) for part in sent])
    assert column(result) == [1.75, 0.75, 1.75, 0.75]
    assert result.sums["trl"] == {"right": [2.0, 4]}
    assert result.sums["through_kwargs"] == {"calls": [4.0, 1]}
    assert result.sums["group"] == {"size": [4.0, 2]}
    assert result.sums["alone"] == {"length": [7.0, 3]}  # the call that failed tells nothing
    assert result.sums["compute_score"] == {"score": [2.0, 4], "acc": [2.0, 4]}
    assert column(result, 8) == [1, 0, 1, 0]
    assert result.sums["reward_func"] == {"score": [4.0, 4], "length": [14.0, 4]}
    for text, answer, row in zip(SAID, columns["answer"], result.logged, strict=True):
        expected = {
            "trl": {"length": len(text), "said": text},
            "through_kwargs": {"said": text},
            "alone": {"said": text},
            "compute_score": {"score": float(text == answer), "acc": text == answer, "pred": text},
            "reward_func": {"score": 2.0 * (text == answer), "length": 1 + len(text), "said": f"p{text}"},
        }
        assert row == {name: values for name, values in expected.items() if (name, text) != ("alone", "bad")}
    assert result.counts["no_score"] == counts(not_a_number=4)
    assert result.counts["short"] == counts(wrong_length=4)
    told = "".join(result.problems)
    assert "a dict must have the reward as its 'score'" in told
    assert "log_extra('x') got 1 values for 4 completions" in told
    assert "KeyError: 'bad'" in told
    assert "got 'x' and 'y' (my_rewards.py:" in told  # the user's own line
    assert ("reward 'many' logged more than 100 metrics in a batch" in told) == (share == 1)  # 80 in each of two
    assert len(result.sums["many"]) == 100


def test_a_function_that_turns_out_to_compare_keeps_what_it_logged_in_the_call_that_counts(write):
    spec = write("""
        def mixed(completions, answer, log_metric, log_extra):
            right = [c.endswith("RIGHT" + a) for c, a in zip(completions, answer)]
            log_metric("completions", len(completions))
            log_extra("right", right)
            return [0.1 * ("boxed" in c) + r / max(1, sum(right)) for c, r in zip(completions, right)]
    """)
    with RewardRunner([spec("mixed")], ["answer"], 2, 5.0, rows=ROWS) as runner:
        assert runner.elementwise == ["mixed"]
        agreed = runner.score(["p"] * 4, ["no", "", "boxed", "boxed"], {"answer": ["2"] * 4}, group_size=4)
        assert agreed.sums == {"mixed": {"completions": [4.0, 4]}}  # and not of the call that looked for a comparison
        found = runner.score(["p"] * 4, RIGHT, {"answer": ["2"] * 4}, group_size=4)
        assert column(found) == [0.5, 0.5, 0.0, 0.1]
        assert found.sums == {"mixed": {"completions": [4.0, 1]}}
        assert found.logged == [{"mixed": {"right": right}} for right in (True, True, False, False)]
