"""The reward contract, the rubric and the ready-made rewards, without worker processes."""

import dataclasses
import datetime
import functools
import json
import math
import os
import queue
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from rewards.contract import RewardSpec, bind, check_specs, elementwise, load_function
from rewards.format import format_regex
from rewards.in_worker import read_requests
from rewards.length import length_penalty
from rewards.moment import Moment, sample_seed
from rewards.number import exact_number_flexible, exact_number_strict, flexible_number, gold_number, strict_number
from rewards.protocol import HEADER, decode, encode, pack, unpack
from rewards.rubric import RewardSummary, summarize, weighted_sum
from rewards.text import after_thinking, boxed, completion_text
from rewards.verify import math_verified
from tests.helpers.places import ROOT


def spec(function: str, **kwargs) -> RewardSpec:
    return RewardSpec("mine", function, 1.0, kwargs)


@pytest.fixture
def restored_imports():
    path, modules = list(sys.path), dict(sys.modules)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name not in modules]:
        del sys.modules[name]


# Contract: recognising the style.


def trl_style(prompts, completions, answer, **kwargs): ...
def trl_ids_only(completion_ids, **kwargs): ...
def trl_kwargs_only(**kwargs): ...
def batch_with_info(completions, info): ...
def verifiers_style(prompt, completion, answer, state): ...
def verifiers_state_only(state): ...
def openrlhf_style(queries, prompts, labels): ...
def verl_style(data_source, solution_str, ground_truth, extra_info=None): ...


class VerifiersTask:
    """As a Task of verifiers 0.4, whose rewards are methods with `@vf.reward`."""

    async def correct(self, trace): ...


@pytest.mark.parametrize(
    ("function", "style"),
    [
        (trl_style, "batch"),
        (trl_ids_only, "batch"),
        (trl_kwargs_only, "batch"),
        (batch_with_info, "batch"),
        (verifiers_style, "sample"),
        (verifiers_state_only, "sample"),
        (verl_style, "verl"),
        (openrlhf_style, "openrlhf"),
    ],
)
def test_style_is_recognised_from_parameter_names(function, style):
    assert bind(function, ["answer", "info"], {}).style == style


def test_async_functions_and_callable_objects_are_recognised():
    async def function(completions, **kwargs): ...

    class Asynchronous:
        async def __call__(self, completion): ...

    class Synchronous:
        def __call__(self, completion): ...

    assert bind(function, [], {}).is_async
    assert bind(Asynchronous(), [], {}).is_async
    assert not bind(Synchronous(), [], {}).is_async
    assert bind(functools.partial(trl_style, answer=["1"]), [], {}).style == "batch"


def test_batch_function_gets_only_the_columns_it_names():
    bound = bind(lambda prompts, completions, answer: None, ["level", "answer"], {})
    assert bound.columns == ("answer",)
    assert bound.batch_arguments(["p"], ["c"], {"answer": ["a"]}, [[1]]) == {
        "prompts": ["p"],
        "completions": ["c"],
        "answer": ["a"],
    }


def test_batch_function_with_any_keyword_gets_every_column_token_ids_and_its_kwargs():
    bound = bind(trl_style, ["answer", "level"], {"scale": 2})
    assert bound.columns == ("answer", "level")
    trl = {"trainer_state": Moment(3, 9, 0.5).trainer_state, "log_metric": print, "log_extra": max}
    of_run = {"step": 3, "seed": [5], "truncated": [True], **trl}  # but TRL's for functions that spell them out
    arguments = bound.batch_arguments(["p"], ["c"], {"answer": ["a"], "level": [3]}, [[7]], of_run)
    assert arguments == {
        "prompts": ["p"],
        "completions": ["c"],
        "answer": ["a"],
        "level": [3],
        "completion_ids": [[7]],
        "scale": 2,
        **trl,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        arguments["trainer_state"].global_step = 4


def test_sample_function_gets_a_state_that_holds_the_row():
    bound = bind(verifiers_style, ["answer", "level"], {})
    arguments = bound.sample_arguments("p", "c", {"answer": "a", "level": 3}, [7])
    assert {name: arguments[name] for name in ("prompt", "completion", "answer")} == {
        "prompt": "p",
        "completion": "c",
        "answer": "a",
    }
    assert arguments["state"]["level"] == 3
    assert arguments["state"]["completion"] == "c"
    assert arguments["state"]["info"] == {}
    assert set(arguments) == {"prompt", "completion", "answer", "state"}


def test_sample_function_without_an_info_column_gets_an_empty_info():
    bound = bind(lambda completion, info: None, ["answer"], {})
    assert bound.sample_arguments("p", "c", {}, None) == {"completion": "c", "info": {}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": "4"}, {"data_source": "", "ground_truth": "4", "extra_info": {}}),
        (
            {"answer": "4", "ground_truth": "5", "data_source": "gsm8k", "extra_info": {"index": 1}},
            {"data_source": "gsm8k", "ground_truth": "5", "extra_info": {"index": 1}},
        ),
        (
            {"reward_model": {"style": "rule", "ground_truth": "6"}, "extra_info": None},
            {"data_source": "", "ground_truth": "6", "extra_info": {}},
        ),
    ],
)
def test_verl_function_gets_its_four_arguments(row, expected):
    bound = bind(verl_style, list(row), {})
    completion = [{"role": "assistant", "content": "so 4"}]
    arguments = bound.sample_arguments("p", completion, {name: row[name] for name in bound.columns}, None)
    info = expected["extra_info"] | {"num_turns": 2, "rollout_reward_scores": {}}  # as verl completes it
    assert arguments == expected | {"solution_str": "so 4", "extra_info": info}
    # With **kwargs it gets them all, and no more; reward_kwargs of verl are kwargs here.
    bound = bind(lambda solution_str, bonus=0, **kwargs: None, [*row, "level"], {"bonus": 1})
    columns = {name: row.get(name, 3) for name in bound.columns}
    assert bound.sample_arguments("p", completion, columns, None, {"step": 1}) == arguments | {"bonus": 1}


@pytest.mark.parametrize(
    ("prompt", "texts", "row", "expected"),
    [
        ("1+1=", None, {"answer": "2"}, {"queries": ["1+1=so 2"], "prompts": ["1+1="], "labels": ["2"]}),
        ("1+1=", ["1+1=", "<bos>1+1=so 2<eos>"], {}, {"queries": ["<bos>1+1=so 2<eos>"], "labels": [""]}),
        ([{"role": "user", "content": "1+1="}], None, {"label": 2}, {"queries": ["1+1=\nso 2"], "labels": [2]}),
        ("1+1=", None, {"labels": "a", "answer": "2", "prompts": "x"}, {"prompts": ["1+1="], "labels": ["a"]}),
    ],
)
def test_openrlhf_function_gets_lists_of_one(prompt, texts, row, expected):
    bound = bind(openrlhf_style, list(row), {})
    completion = "so 2" if isinstance(prompt, str) else [{"role": "assistant", "content": "so 2"}]
    columns = {name: row[name] for name in bound.columns}
    arguments = bound.sample_arguments(prompt, completion, columns, None, {"step": 1}, texts)
    assert arguments.keys() == {"queries", "prompts", "labels"}
    assert expected.items() <= arguments.items()


def test_a_column_wins_over_what_is_injected_under_its_name_but_over_no_object_of_the_style():
    names = ["completion", "completion_ids", "completions", "prompts", "solution_str", "state", "step"]
    row = {name: f"column {name}" for name in names}
    batch = bind(lambda prompts, completions, step, **columns: None, names, {})
    of_run = {"step": 3, "seed": [5], "truncated": [True], "finish_reason": ["length"]}
    lists = {name: [value] for name, value in row.items()}
    assert batch.batch_arguments(["p"], ["c"], lists, [[7]], of_run) == lists
    assert not batch.takes_completion_ids
    sample = bind(lambda completion, state, truncated, seed: None, names, {})
    arguments = sample.sample_arguments("p", "c", row, [7], {"step": 3, "seed": 5, "truncated": True})
    state = arguments.pop("state")  # of verifiers, who keeps what was drawn in it
    assert arguments == {"completion": "column completion", "truncated": True, "seed": 5}
    assert (state["completion"], state["completion_ids"]) == ("c", [7])
    assert {name: state[name] for name in ("prompts", "completions")} == {
        name: f"column {name}" for name in ("prompts", "completions")
    }
    verl = bind(lambda solution_str, completion_ids, seed, completions=None: None, names, {})
    assert verl.sample_arguments("p", "c", row, [7], {"step": 3, "seed": 5}) == {
        "solution_str": "c",
        "completion_ids": "column completion_ids",
        "completions": "column completions",
        "seed": 5,
    }


def test_a_seed_of_a_sample_is_a_function_of_the_run_the_step_and_its_place():
    places = [(seed, step, p, g) for seed in range(2) for step in range(5) for p in range(5) for g in range(5)]
    seeds = [sample_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(0, 0, 0, 0) == 1137562365


def test_kwargs_win_over_a_column_and_an_injected_value_of_the_same_name():
    constant = bind(lambda completion, seed: None, [], {"seed": 9})
    assert constant.sample_arguments("p", "c", {}, None, {"seed": 1, "step": 0})["seed"] == 9
    bound = bind(lambda completion, level: None, ["level"], {"level": 9})
    assert bound.sample_arguments("p", "c", {"level": 1}, None)["level"] == 9


def test_required_token_ids_are_told():
    assert bind(trl_ids_only, [], {}).needs_completion_ids
    assert bind(trl_style, ["answer"], {}).takes_completion_ids
    assert not bind(trl_style, ["answer"], {}).needs_completion_ids
    assert not bind(lambda completions: None, [], {}).takes_completion_ids
    assert not bind(verl_style, ["answer"], {}).takes_completion_ids
    assert not bind(length_penalty, [], {"limit": 4, "buffer": 2}).needs_completion_ids


# Contract: refusals at start.


@pytest.mark.parametrize(
    ("function", "columns", "kwargs", "words"),
    [
        (trl_style, ["anwser"], {}, ["trl_style", "'answer'", "did you mean the column 'anwser'", "kwargs"]),
        (verifiers_style, [], {}, ["verifiers_style", "'answer'", "none"]),
        (verl_style, ["question"], {}, ["'ground_truth'", "question"]),
        (lambda completions: None, [], {"log_extra": 2}, ["'log_extra'", "rollout"]),
        (
            lambda prompt, trunkated: None,
            ["level"],
            {},
            ["'trunkated'", "did you mean 'truncated'", "group, truncated"],
        ),
        (lambda completions, group: None, [], {"elementwise": 1}, ["'elementwise'", "its parameters"]),
        (elementwise(lambda completions, group: None), [], {}, ["'group'", "drop one of them"]),
        (lambda completions, scale=1: None, [], {"scal": 2}, ["'scal'", "did you mean 'scale'"]),
        (lambda completions: None, [], {"other": 2}, ["'other'", "its parameters are completions"]),
        (lambda completions, **kwargs: None, [], {"prompts": 2}, ["'prompts'", "rollout"]),
        (lambda prompt, completions: None, [], {}, ["'prompt'", "'completions'", "one of them"]),
        (lambda text: None, [], {}, ["text", "solution_str"]),
        (lambda queries, group: None, [], {}, ["'group'", "queries, prompts, labels"]),
        (VerifiersTask().correct, ["answer"], {}, ["correct", "'trace'", "prompt and completion"]),
        (lambda task, trace: None, ["task"], {}, ["'trace'", "@vf.reward"]),
        (lambda completions, /: None, [], {}, ["positional only"]),
        (dict, [], {}, ["cannot be read"]),
        (VerifiersTask, ["answer"], {}, ["it is a class", "name an instance of it"]),
    ],
)
def test_function_that_cannot_be_called_is_refused_with_the_way_out(function, columns, kwargs, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        bind(function, columns, kwargs)
    for word in words:
        assert word in str(caught.value)


def test_reward_file_is_loaded_once_and_may_import_its_neighbours(tmp_path, restored_imports):
    (tmp_path / "my_helper.py").write_text("FACTOR = 3\n")
    (tmp_path / "reward.py").write_text(
        "import my_helper\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Pair:\n    x: int\n"
        "class Holder:\n    @staticmethod\n    def inner(completion): return my_helper.FACTOR\n"
        "def one(completion): return Pair(1).x\n"
    )
    one = load_function(spec(f"{tmp_path}/reward.py:one"))
    inner = load_function(spec(f"{tmp_path}/reward.py:Holder.inner"))
    assert (one(completion="x"), inner(completion="x")) == (1, 3)
    assert sys.modules[one.__module__] is sys.modules[inner.__module__]
    (tmp_path / "reward.py").write_text("def one(completion): return 7\n")  # as from a notebook that lives on
    assert load_function(spec(f"{tmp_path}/reward.py:one"))(completion="x") == 7


def test_two_reward_files_of_one_name_are_two_modules(tmp_path, restored_imports):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "reward.py").write_text(f"def f(completion): return {value}\n")
    values = [load_function(spec(f"{tmp_path}/{folder}/reward.py:f"))(completion="") for folder in "ab"]
    assert values == [1, 2]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("rewards.number", ["'module:function'", "'rewards.number'"]),
        ("rewards.nothing:f", ["'mine'", "rewards.nothing", "does not import", ".py"]),
        ("missing.py:f", ["missing.py", "no such file"]),
        ("BROKEN:f", ["SyntaxError"]),
        ("LEAVES:f", ["SystemExit"]),
        ("rewards.number:exact_number_strickt", ["did you mean 'exact_number_strict'"]),
        ("rewards.number:_MAX_DIGITS", ["must be callable", "int"]),
    ],
)
def test_function_that_does_not_load_is_refused(tmp_path, restored_imports, function, words):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    function = function.replace("BROKEN", f"{tmp_path}/broken.py").replace("LEAVES", f"{tmp_path}/leaves.py")
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        load_function(spec(function))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("specs", "word"),
    [
        ([], "at least one"),
        ([RewardSpec("a", "m:f", 1.0, {}), RewardSpec("a", "m:g", 1.0, {})], "'a' 2 times"),
        ([RewardSpec("a", "m:f", math.nan, {})], "finite"),
        ([RewardSpec("a", "m:f", math.inf, {})], "finite"),
        ([RewardSpec("a", "m:f", -1e31, {})], r"got -1e\+31"),
    ],
)
def test_bad_list_of_specs_is_refused(specs, word):
    with pytest.raises(ValueError, match=word):
        check_specs(specs)


def test_every_value_of_a_data_set_arrives_as_it_was_also_one_with_the_tag_of_the_protocol():
    tag = "__tandem_type__"
    values = [
        {tag: "bytes", "value": 5},
        {tag: "bytes", "value": "aGk="},
        {tag: "date"},
        {tag: "mapping", "value": [["a", 1]]},
        {tag: None},
        {tag: {tag: b"hi"}, "value": [{tag: "decimal", "value": "1.5"}], "when": datetime.date(2020, 1, 2)},
        [b"\x00", Decimal("1.50"), datetime.datetime(2020, 1, 2, 3, 4), {"plain": {"nested": None}}],
    ]
    buffer = bytearray(pack({"columns": {tag: encode(values, "column 'meta'")}}))
    assert unpack(buffer) == [{"columns": {tag: values}}]
    assert not buffer


def test_a_worker_that_cannot_read_a_request_ends_and_does_not_wait_for_the_next():
    inbox = queue.SimpleQueue()
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as requests, open(write, "wb", buffering=0) as other_end:
        other_end.write(HEADER.pack(1) + b"{")
        with pytest.raises(json.JSONDecodeError):
            read_requests(requests, inbox.put)
    assert inbox.get_nowait() is None


def test_ready_made_functions_judge_each_completion_by_itself():
    for function in (exact_number_strict, exact_number_flexible, math_verified, format_regex, length_penalty):
        assert function.elementwise, function

    def mine(completions): ...

    assert bind(mine, [], {}).calls is None
    assert bind(elementwise(mine), [], {}).calls == "elementwise"


def test_rewards_import_neither_jax_nor_rl():
    names = [path.stem for path in (ROOT / "rewards").glob("*.py") if path.stem != "__init__"]
    assert len(names) >= 12
    code = "import sys\n" + "".join(f"import rewards.{name}\n" for name in names)
    code += "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'rl', 'flax', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Protocol.


def test_values_survive_the_protocol():
    row = {
        "text": "caf\N{LATIN SMALL LETTER E WITH ACUTE} \ud800 \N{GRINNING FACE}",
        "number": 0.1,
        "large": 2**70,
        "infinite": math.inf,
        "none": None,
        "flag": True,
        "nested": [{"a": [1, 2.5]}],
        "bytes": b"\x00\xff",
        "decimal": Decimal("1.10"),
        "date": datetime.date(2024, 2, 29),
        "time": datetime.datetime(2024, 2, 29, 1, 2, 3),
    }
    assert unpack(bytearray(pack(encode(row, "row")))) == [row]
    converted = encode({"array": np.arange(3), "scalar": np.float32(0.5), "tuple": (1, 2)}, "row")
    assert converted == {"array": [0, 1, 2], "scalar": 0.5, "tuple": [1, 2]}
    assert decode({"a": 1}) == {"a": 1}


def test_frames_are_taken_only_when_complete():
    frames = pack({"a": 1}) + pack({"b": [2]})
    buffer, seen = bytearray(), []
    for byte in frames:
        buffer.append(byte)
        seen += unpack(buffer)
    assert seen == [{"a": 1}, {"b": [2]}]
    assert not buffer


@pytest.mark.parametrize(("value", "word"), [({1: "a"}, "keys"), ({1, 2}, "set"), ([object()], "object")])
def test_value_that_cannot_be_sent_is_refused_by_its_place(value, word):
    with pytest.raises(ValueError, match=f"column 'x'.*{word}"):
        encode(value, "column 'x'")


# Rubric.


@pytest.mark.parametrize(
    ("row", "weights", "expected"),
    [
        ([1.0, 0.5], [1.0, 2.0], 2.0),
        ([1.0, None], [1.0, 2.0], 1.0),  # None adds nothing
        ([None, None], [1.0, 2.0], None),
        ([0.0, None], [1.0, 2.0], 0.0),  # judged as 0, which is not None
        ([1.0, 5.0], [1.0, 0.0], 1.0),  # weight 0 is a metric
        ([None, 5.0], [1.0, 0.0], None),  # and a metric judges nothing
        ([1.0, 1.0], [1.0, -0.5], 0.5),
    ],
)
def test_weighted_sum(row, weights, expected):
    assert weighted_sum(row, weights) == expected


def test_weighted_sum_wants_a_weight_per_function():
    with pytest.raises(ValueError, match="got 1"):
        weighted_sum([1.0], [1.0, 2.0])


def test_summary_leaves_unjudged_samples_out():
    summary = summarize([[1.0, None], [3.0, None], [None, None]], ["a", "b"])
    assert summary == {"a": RewardSummary(2.0, 1.0, 2, 1), "b": RewardSummary(None, None, 0, 3)}
    assert summarize([], ["a"]) == {"a": RewardSummary(None, None, 0, 0)}
    with pytest.raises(ValueError, match="one entry per function"):
        summarize([[1.0]], ["a", "b"])


# Text.


def test_completion_text_takes_strings_and_message_lists():
    assert completion_text("plain") == "plain"
    assert completion_text([{"role": "assistant", "content": "one"}]) == "one"
    turns = [
        {"role": "assistant", "content": "first"},
        {"role": "tool", "content": "9"},
        {"role": "assistant", "content": "last"},
        {"role": "user", "content": "10"},
    ]
    assert completion_text(turns) == "last"
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"
    assert completion_text([]) == ""
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    for wrong in (None, 3, ["text"]):
        with pytest.raises(ValueError, match="string or a list of chat messages"):
            completion_text(wrong)  # pyright: ignore[reportArgumentType]


def test_boxes_are_found_with_balanced_braces():
    assert boxed(r"\boxed{1} and \boxed {\frac{3}{4}}") == ["1", r"\frac{3}{4}"]
    assert boxed(r"\boxed{\boxed{1}}") == [r"\boxed{1}"]
    assert boxed(r"\boxed{\{1\}}") == [r"\{1\}"]
    assert boxed(r"\boxed{1} \boxed{2") == ["1", None]
    assert boxed("boxed{1}") == []
    assert after_thinking("<think>1</think>a</think> b") == " b"


# Exact number. (completion, strict, flexible)

NUMBERS = [
    ("42", "42", "42"),
    ("  42\n", "42", "42"),
    ("42.", "42", "42"),
    ("#### 42", "42", "42"),
    ("6*7\n#### 42\n", "42", "42"),
    ("####42", "42", "42"),
    (r"so $\boxed{42}$.", "42", "42"),
    (r"\boxed{\boxed{42}}", "42", "42"),
    (r"\boxed {42}", "42", "42"),
    (r"#### \boxed{42}", "42", "42"),
    (r"\boxed{$42$}", "42", "42"),
    ("$42$", "42", "42"),
    # signs
    ("-3", "-3", "-3"),
    ("+3", "3", "3"),
    ("\N{MINUS SIGN}3", "-3", "-3"),
    ("#### -$3", "-3", "-3"),
    ("#### $-3", "-3", "-3"),
    ("x = -3", None, "-3"),
    ("10-3", None, "3"),  # a subtraction
    ("10 - 3", None, "3"),
    ("f(x)-3", None, "3"),
    # thousands and decimals
    ("1,234", "1234", "1234"),
    ("1{,}234", "1234", "1234"),
    (r"\boxed{1{,}234{,}567}", "1234567", "1234567"),
    (r"12\,000", "12000", "12000"),
    (r"1,\!234", "1234", "1234"),
    ("12,34", None, "34"),
    ("1,2345", None, "2345"),
    ("1,2,3", None, "3"),
    ("3.0", "3", "3"),
    (".5", "1/2", "1/2"),
    ("1.2.3", None, "6/5"),  # the 3 is no number of its own
    ("1e3", "1000", "1000"),
    ("2.5E-1", "1/4", "1/4"),
    # units
    ("$12", "12", "12"),
    (r"\$12.50", "25/2", "25/2"),
    ("$1,234.50.", None, "2469/2"),
    ("50%", "50", "50"),
    (r"\boxed{50\%}", "50", "50"),
    ("\N{EURO SIGN}12", "12", "12"),
    ("#### \N{POUND SIGN}1,000", "1000", "1000"),
    ("12 dollars", None, "12"),
    ("#### 12 dollars", None, "12"),
    ("12 \N{EURO SIGN}", "12", "12"),
    # spaces inside of a number
    ("1 234", "1234", "1234"),
    ("#### 10 000 000.", "10000000", "10000000"),
    (r"\boxed{1~234}", "1234", "1234"),
    (r"\boxed{1\ 234}", "1234", "1234"),
    ("It is 1\N{NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567 now.", None, "1234567"),
    ("It is 1 234", None, "234"),  # which may be two numbers
    ("12 34", None, "34"),
    ("1 2345", None, "2345"),
    ("1 123/246", "3/2", "3/2"),
    # minus
    ("\N{MINUS SIGN}7", "-7", "-7"),
    ("It is \N{MINUS SIGN}7.", None, "-7"),
    ("\N{EN DASH}7", "-7", "-7"),
    ("10\N{EN DASH}7", None, "7"),
    ("- 7", "-7", "-7"),
    # math around the number
    (r"\(12\)", "12", "12"),
    (r"\[ \boxed{12} \]", "12", "12"),
    (r"\(", None, None),
    # fractions
    ("The ratio is 3 / 4.", None, "3/4"),
    ("3/4", "3/4", "3/4"),
    (r"\boxed{\frac{3}{4}}", "3/4", "3/4"),
    (r"-\dfrac{3}{4}", "-3/4", "-3/4"),
    ("6/8", "3/4", "3/4"),
    ("3/0", None, None),
    (r"\frac12", "1/2", "1/2"),
    (r"\boxed{\frac{3}{-4}}", "-3/4", "-3/4"),
    ("1 1/2", "3/2", "3/2"),
    (r"-1\frac{1}{2}", "-3/2", "-3/2"),
    ("3 7/2", None, "7/2"),  # no mixed number
    (r"2\frac{7}{3}", None, None),
    # several answers
    (r"\boxed{41} or \boxed{42}", None, "42"),
    (r"\boxed{42} or \boxed{42}", None, "42"),
    ("#### 41\n#### 42", None, "42"),
    ("#### 41 maybe\n#### 42", None, "42"),
    ("\\boxed{41}\n#### 42", None, "42"),
    ("#### 42\nNo, 43", None, "43"),
    ("#### Step one\nadd 2\n#### 42", "42", "42"),  # a heading is not an answer
    (r"\boxed{42} in 3 steps", "42", "42"),  # what is stated comes before what is last
    (r"\boxed{42", None, "42"),
    (r"\boxed{}", None, None),
    (r"\boxed{forty}", None, None),
    # scratch work
    (r"<think>\boxed{41}</think> \boxed{42}", "42", "42"),
    ("<think>42</think>", None, None),
    # nothing, and too much
    ("", None, None),
    ("no number", None, None),
    ("The answer is 42", None, "42"),
    ("42 43", None, "43"),
    ("1e99999", None, "99999"),
    ("9" * 401, None, None),
    ("9" * 100_000, None, None),
    ("\N{ARABIC-INDIC DIGIT FOUR}", None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), NUMBERS, ids=[repr(row[0][:24]) for row in NUMBERS])
def test_number_of_a_completion(text, strict, flexible):
    assert strict_number(text) == (None if strict is None else Fraction(strict))
    assert flexible_number(text) == (None if flexible is None else Fraction(flexible))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", Fraction(42)),
        ("She has 2 + 40.\n#### 1,042", Fraction(1042)),
        (42, Fraction(42)),
        (np.int64(42), Fraction(42)),
        (0.1, Fraction(1, 10)),
        (np.float64(0.1), Fraction(1, 10)),
        (Decimal("3.0"), Fraction(3)),
        (r"\boxed{42}", Fraction(42)),
        ("", None),
        ("   ", None),
        ("####", None),
        (None, None),
        (True, None),
        ("forty-two", None),
        (math.nan, None),
        (["42"], None),
    ],
)
def test_number_of_a_gold_answer(answer, expected):
    assert gold_number(answer) == expected


def test_exact_number_compares_values_not_spellings():
    completions = ["#### 3.0", "#### 4", "3", "#### 1,000", "it is 3", "#### 3"]
    answers = ["3", "3", 3, "1000.00", "3", ""]
    prompts = ["p"] * len(answers)
    assert exact_number_strict(prompts, completions, answers) == [1.0, 0.0, 1.0, 1.0, 0.0, None]
    assert exact_number_flexible(prompts, completions, answers) == [1.0, 0.0, 1.0, 1.0, 1.0, None]


def test_an_empty_completion_never_equals_an_empty_gold():
    assert exact_number_flexible(["p"], [""], [""]) == [None]
    assert exact_number_strict(["p"], [""], ["0"]) == [0.0]


# Math.


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"$\frac{1}{2}$", 1.0),
        (r"the answer is $2\sqrt{3}$", r"2\sqrt{3}", 1.0),
        (r"the answer is 2", r"2\sqrt{3}", 0.0),  # math-verify reads the bare gold as 2
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"\boxed{(1,2)}", "(1,2)", 1.0),
        ("#### 42", "6*7\n#### 42", 1.0),
        (r"\boxed{42}", 42, 1.0),
        (r"\boxed{41}", 42, 0.0),
        (r"\boxed{41}, \boxed{42}", "42", 0.0),
        (r"\boxed{42}. Final answer: \boxed{42}", "42", 1.0),  # math-verify alone reads 4242
        (r"\boxed{1} \boxed{2}", r"\{1,2\}", 0.0),
        (r"<think>\boxed{41}</think>\boxed{42}", "42", 1.0),
        (r"\boxed{42", "42", 0.0),
        ("", "42", 0.0),
        ("42", "", None),
        ("42", None, None),
        ("#### \\$18.00", "18", 1.0),
        ("so\n####12", "12", 1.0),
        ("#### 13\nor 12?", "13", 0.0),  # the last line is the one that counts
        ("<answer>12</answer>", "12", 1.0),
        ("<answer>It is $x = 12$.</answer> in 3 steps", "12", 1.0),
        ("<answer>11</answer><answer>12</answer>", "12", 0.0),
        ("<answer></answer>12", "12", 0.0),
        ("\N{MINUS SIGN}7", "-7", 1.0),
        ("1e3", "1000", 1.0),
        (r"\boxed{1\,234}", "1234", 1.0),
        ("3/2", "1 1/2", 1.0),
        (r"\frac{5\sqrt{3}}{2}", r"\frac{5\sqrt{3}}{2}", 1.0),
        ("12.01", "12", 0.0),
    ],
)
def test_math_verified(completion, answer, expected):
    assert math_verified(["p"], [completion], [answer]) == [expected]


# Format and length.


def test_format_regex_matches_the_whole_text_or_a_part():
    texts = ["<a>1\n2</a>", "x <a>1</a>", [{"role": "assistant", "content": "<a>3</a>"}]]
    prompts = ["p"] * 3
    assert format_regex(prompts, texts, pattern=r"<a>.*</a>") == [1.0, 0.0, 1.0]
    assert format_regex(prompts, texts, pattern=r"<a>.*</a>", full_match=False) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="regular expression"):
        format_regex(prompts, texts, pattern="(")


def test_length_penalty_is_the_soft_overlong_punishment_of_dapo():
    ids = [[1] * length for length in (0, 6, 7, 8, 10, 11)]
    penalties = length_penalty(["p"] * 6, ["c"] * 6, limit=10, buffer=4, completion_ids=ids)
    assert penalties == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_length_penalty_says_which_unit_it_lacks():
    assert length_penalty(["p"], ["12345"], limit=6, buffer=2, unit="characters") == [-0.5]
    with pytest.raises(ValueError, match="completion_ids"):
        length_penalty(["p"], ["c"], limit=6, buffer=2)
    with pytest.raises(ValueError, match="buffer=7 and limit=6"):
        length_penalty(["p"], ["c"], limit=6, buffer=7)
    with pytest.raises(ValueError, match="words"):
        length_penalty(["p"], ["c"], limit=6, buffer=2, unit="words")  # pyright: ignore[reportArgumentType]


def test_ready_made_functions_take_the_calls_of_trl_and_tunix():
    chat = [[{"role": "assistant", "content": "#### 42"}], [{"role": "assistant", "content": "#### 43"}]]
    prompts = [[{"role": "user", "content": "6*7?"}]] * 2
    columns = {"answer": ["42", "42"], "level": [1, 2]}
    for function in (exact_number_strict, exact_number_flexible, math_verified):
        trl = function(
            prompts=prompts,
            completions=chat,
            completion_ids=[[1], [2]],
            trainer_state=object(),
            log_extra=print,
            **columns,
        )
        tunix = function(prompts=["p", "p"], completions=["#### 42", "#### 43"], **columns)
        assert trl == tunix == [1.0, 0.0]
