"""What TRL's `GRPOTrainer` hands to a reward function and takes back, beside what the runner does: the same functions,
the same completions.
"""

import asyncio
import collections
import contextlib
import importlib.util
import json
import struct
import threading
import types

import pytest

from rewards.contract import RewardSpec
from rewards.moment import Moment
from rewards.runner import RewardRunner

# It needs torch, which the toolkit does not depend on: `pip install torch "trl==1.16.*" pytest`.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

FUNCTIONS = """
import asyncio, json


def shown(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
    state = [trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch]
    seen = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "state": state}
    seen |= {"columns": columns}
    log_extra("seen", [json.dumps(seen, sort_keys=True)] * len(prompts))
    return [1.0] * len(prompts)


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def some_none(completions, answer, log_metric, log_extra, **columns):
    found = [text_of(completion) for completion in completions]
    log_extra("found", found)
    for text in found:
        log_metric("length", float(len(text)))
    return [None if gold is None else float(text == gold) for text, gold in zip(found, answer)]


async def slow(prompts, completions, level, log_metric, trainer_state, **columns):
    await asyncio.sleep(0)
    log_metric("level", sum(level) / len(level))
    return [number * (1 + trainer_state.global_step) if number else None for number in level]


class Named:
    def __call__(self, prompts, completions, **columns):
        return [len(prompt) / 8 for prompt in prompts]


def whole(completions, **columns):
    longest = max(len(text_of(completion)) for completion in completions)
    return [len(text_of(completion)) / longest for completion in completions]


def trl_only(prompts, completions, completion_ids, **columns):
    return [float("trainer_state" in columns and "log_extra" in columns and "log_metric" in columns)] * len(prompts)


def wrong_length(completions, **columns):
    return [1.0]


class Later:
    async def __call__(self, completion_ids, **columns):
        await asyncio.sleep(0)
        return [len(ids) / 4 for ids in completion_ids]


named, later = Named(), Later()
"""
NAMES = ("shown", "some_none", "slow", "named", "later", "whole", "trl_only")
TEXTS = ["4", "five", "", "4 or 5"]
IDS = [[7], [8, 9], [], [7, 1, 2]]
COLUMNS = {"answer": ["4", None, "4", "4 or 5"], "level": [1, 0, 2, 3], "tags": [["a"], [], ["b", "c"], ["d"]]}
STATE = Moment(step=3, max_steps=10, epoch=0.5)


def rows(is_chat):
    """Prompts and completions as the two trainers have them."""
    prompts = [f"{number}+{number}=" for number in range(4)]
    if not is_chat:
        return prompts, TEXTS
    messages = [[{"role": "system", "content": "Add."}, {"role": "user", "content": prompt}] for prompt in prompts]
    return messages, [[{"role": "assistant", "content": text}] for text in TEXTS]


@pytest.fixture(scope="module")
def trl():
    for name in ("torch", "trl"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed; pip install torch "trl==1.16.*" runs this test')
    return pytest.importorskip("trl")


def by_trl(trl, functions, prompts, completions):
    """Rewards by sample, logged columns and metrics, of TRL's own method on a stand-in for the rest of its trainer."""
    import torch

    class Accelerator:
        device = torch.device("cpu")

        @staticmethod
        def gather(value):
            return value

    own = trl.GRPOTrainer
    trainer = types.SimpleNamespace(
        accelerator=Accelerator(),
        reward_funcs=functions,
        reward_func_names=[getattr(function, "__name__", type(function).__name__) for function in functions],
        reward_processing_classes=[None] * len(functions),
        state=STATE.trainer_state,
        environments=None,
        chat_template_kwargs={},
        async_loop=asyncio.new_event_loop(),
        _pending_extra_logs=collections.defaultdict(list),
        _pending_metrics=collections.defaultdict(list),
    )
    trainer._log_completion_extra = types.MethodType(own._log_completion_extra, trainer)
    trainer._log_metric = types.MethodType(own._log_metric, trainer)
    thread = threading.Thread(target=trainer.async_loop.run_forever, daemon=True)
    thread.start()
    inputs = [
        {"prompt": prompt} | {name: values[place] for name, values in COLUMNS.items()}
        for place, prompt in enumerate(prompts)
    ]
    calculate = getattr(own._calculate_rewards, "__wrapped__", own._calculate_rewards)
    module = importlib.import_module(own.__module__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gather", Accelerator.gather)
        patch.setattr(module, "profiling_context", lambda *_: contextlib.nullcontext())
        try:
            given = calculate(trainer, inputs, prompts, completions, IDS)
        finally:
            trainer.async_loop.call_soon_threadsafe(trainer.async_loop.stop)
            thread.join()
            trainer.async_loop.close()
    rewards = [[None if value != value else value for value in row] for row in given.tolist()]
    return rewards, trainer._pending_extra_logs, trainer._pending_metrics


@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_functions_get_and_give_what_they_do_in_trl(trl, tmp_path, is_chat):
    assert trl.__version__.startswith("1.16."), "another version than the one whose conventions are taken"
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    namespace = {}
    exec(FUNCTIONS, namespace)
    prompts, completions = rows(is_chat)
    theirs, their_columns, their_metrics = by_trl(trl, [namespace[name] for name in NAMES], prompts, completions)
    specs = [RewardSpec(name, f"{tmp_path}/mine.py:{name}", 1.0, {}, "whole_batch") for name in NAMES]
    with RewardRunner(specs, list(COLUMNS), 2, 30.0, moment=STATE) as runner:
        ours = runner.score(prompts, completions, COLUMNS, IDS, group_size=2)
    assert not ours.problems
    single = [[None if v is None else struct.unpack("f", struct.pack("f", v))[0] for v in row] for row in ours.rewards]
    assert single == theirs  # which are float32
    assert any(None in row for row in theirs)
    logged = {name: [of_sample[name] for of_sample in ours.logged] for name in ("shown", "some_none")}
    assert [json.loads(values["seen"]) for values in logged["shown"]] == [json.loads(t) for t in their_columns["seen"]]
    assert [values["found"] for values in logged["some_none"]] == their_columns["found"]
    assert ours.sums["some_none"]["length"] == [sum(their_metrics["length"]), len(their_metrics["length"])]
    assert ours.sums["slow"]["level"] == [sum(their_metrics["level"]), 1]


def test_a_wrong_number_of_rewards_ends_trl_and_costs_a_reward_here(trl, tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    namespace = {}
    exec(FUNCTIONS, namespace)
    prompts, completions = rows(False)
    with pytest.raises(ValueError, match="returned 1 rewards, but 4 were expected"):
        by_trl(trl, [namespace["wrong_length"]], prompts, completions)
    specs = [RewardSpec("mine", f"{tmp_path}/mine.py:wrong_length", 1.0, {}, "whole_batch")]
    with RewardRunner(specs, list(COLUMNS), 1, 30.0) as runner:
        ours = runner.score(prompts, completions, COLUMNS, IDS)
    assert ours.rewards == [[None]] * 4
    assert ours.counts["mine"]["wrong_length"] == 4
