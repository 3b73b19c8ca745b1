"""Episodes in a whole run: what environments and the policy say in turn, what becomes of it, and every limit."""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from rl.config.load import load_config
from rl.data.byte_tokenizer import ByteBackend
from rl.data.tokenizer import Tokenizer
from rl.grpo_trainer import train
from rl.rollout import collector
from rl.rollout.journal import StepJournal
from rl.run.metrics import read_metrics, read_samples
from rl.sampler.slot_session import SlotSession
from rl.tools.evaluate import evaluate_source
from rl.tools.samples.sample import main as sample_main
from tests.devices.test_hosts import Launched
from tests.helpers.metric_lines import steady, without_entry
from tests.helpers.places import ROOT

# Each kind of row ends in its own way. A group has four episodes, which start alike unless the kind says otherwise.
GAME = """
import os
import pathlib
import random
import signal

class Game:
    made = 0

    def reset(self, row, seed):
        Game.made += 1
        self.kind, self.turns = row["kind"], 0
        start = Game.made if self.kind == "differs" else random.randrange(100)
        return f"{row['prompt']} {start}:"

    def step(self, message):
        from rewards.environment import Step
        self.turns += 1
        if self.turns == 2 and self.kind == "plain":
            self.kill()
        if self.kind == "raises" and self.turns == 2:
            raise RuntimeError("lost")
        text = "?" * 60 if self.kind == "long" else f" [{len(message['content'])}]"
        done = self.turns == 2 and self.kind not in ("endless", "long")
        reward = None if self.kind == "endless" else self.turns / 4
        return Step([{"role": "user", "content": text}], reward, done, {"turn": self.turns})

    def kill(self):  # ends the run in its second step, where a file names its process
        mark = pathlib.Path(__file__).with_name("kill")
        if mark.exists():
            count, process = map(int, mark.read_text().split())
            if count:
                mark.write_text(f"{count - 1} {process}")
            else:
                mark.unlink()
                os.kill(process, signal.SIGKILL)

    def close(self):
        pass


class Again(Game):  # its second turn begins with another prompt, or each does
    def step(self, message):
        from rewards.environment import Step
        self.turns += 1
        if self.turns == 1 or self.kind == "endless":
            return Step(reward=1.0, prompt=f"again, behind {len(message['content'])}:")
        text = [{"role": "user", "content": " [on]"}]
        return Step(text, reward=len(message["content"]) / 8, done=self.turns == 3)


class Seeded(Game):  # needs no data
    def reset(self, row, seed):
        assert set(row) == {"prompt"}, row
        kind = ("plain", "raises")[seed % 4 == 0]
        return super().reset({"kind": kind, "prompt": row["prompt"] + f"play {seed % 1000}"}, seed)
"""
# Turns end with <eos>, and a tool is shown by its name.
TEMPLATE = """{%- for tool in tools or [] %}[{{ tool.function.name }}]{% endfor -%}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ message.content }}<eos>
{%- else %}{{ message.role[0] }}:{{ message.content }};
{%- endif %}{% endfor -%}"""
TOOLS = '''
def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: one
        b: another
    """
    return a + b
'''
KINDS = ("plain", "raises", "endless", "long", "differs")
RECIPE = """
seed: 1
model:
  arch: {hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}
data: {columns: {answer: null}, max_prompt_length: 24}
sampling: {max_completion_length: 24, temperature: 0.7, slots: 8}
rollout: {max_turn_tokens: 7, max_turns: 3, max_episode_tokens: 64}
rewards: {functions: [{function: "%s:length", weight: 0.5}, {function: "%s:asked", name: asked, weight: 0}, TURNED]}
grpo: {steps: 2, prompts_per_step: 5, group_size: 4, beta: 0.0, minibatches: 5}
optimizer: {lr: 1.0e-3}
mesh: {num_devices: 1}
logging: {samples_per_step: 20}
""".replace("TURNED", '{function: "%s:turned", name: turned, weight: 0}')


def start(folder: pathlib.Path, name: str, *overrides: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The metrics and samples of a run."""
    arguments = [f"output_dir={folder / name}", f"data.source={folder / 'rows.jsonl'}", *overrides]
    path = train(load_config(folder / "recipe.yml", arguments))
    lines = read_metrics(path)
    assert not any(map(without_entry, lines))
    return lines, read_samples(path)


def without_rounding(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample without the differences between sampler and trainer, which are of the size of rounding."""
    return {**sample, "per_token": {**sample["per_token"], "difference": None}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("episodes")
    (folder / "game.py").write_text(GAME)
    length = "def length(completion):\n    return len(completion) / 100\n"
    asked = "def asked(prompt):\n    return float(prompt.endswith(':'))\n"
    turned = "def turned(environments, completions):\n    return [game.turns / 10 for game in environments]\n"
    told = "def told(completion):\n    return float(len(completion))\n"
    (folder / "rewards.py").write_text(length + asked + turned + told)
    (folder / "recipe.yml").write_text(RECIPE % ((folder / "rewards.py",) * 3))
    rows = [{"prompt": f"play {i}", "kind": kind} for i, kind in enumerate(KINDS)]
    for name, kept in (("rows", rows), ("seeded", rows[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    game = f"rollout.environment={folder / 'game.py'}:Game"
    return {flavour: start(folder, flavour, game, f"pure_nnx={flavour}") for flavour in ("true", "false")}


@pytest.fixture(scope="module")
def samples(runs) -> dict[str, list[dict[str, Any]]]:
    """The samples of the first step by kind."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    kinds = {f"play {i}": kind for i, kind in enumerate(KINDS)}
    for sample in runs["true"][1]:
        if sample["step"] == 1:
            by_kind.setdefault(kinds[" ".join(sample["prompt"].split()[:2])], []).append(sample)
    assert {kind: len(own) for kind, own in by_kind.items()} == dict.fromkeys(KINDS, 4)
    return by_kind


def test_both_flavours_play_the_same_episodes_bit_for_bit(runs):
    (metrics, samples), (of_linen, samples_of_linen) = runs["true"], runs["false"]
    assert samples == samples_of_linen
    for line, other in zip(metrics, of_linen, strict=True):
        # What is prefilled together follows the clock, and moves log-probs in the last digits.
        line, other = ({key: math.nan if x is None else x for key, x in steady(each).items()} for each in (line, other))
        assert line == pytest.approx(other, rel=1e-3, abs=1e-6, nan_ok=True)


def test_the_sampler_and_the_trainer_agree_on_every_token_that_was_drawn(runs):
    for line in runs["true"][0]:
        assert line["drawn_difference/max"] <= 1e-4
    assert runs["true"][0][1]["compiles"] == 0, "all programs are there after the first step"


def test_tokens_are_appended_and_only_drawn_ones_are_trained(samples):
    tokenizer = Tokenizer(ByteBackend())
    for sample in [sample for own in samples.values() for sample in own]:
        # Runs of drawn tokens and of observations, in turn.
        runs: list[tuple[int, list[int]]] = []
        trained = sample.get("trained", [1] * sample["num_tokens"])
        for token, is_drawn in zip(sample["token_ids"], trained, strict=True):
            if not runs or runs[-1][0] != is_drawn:
                runs.append((is_drawn, []))
            runs[-1][1].append(token)
        said = {1: "assistant", 0: "user"}
        told = [(said[is_drawn], ids) for is_drawn, ids in runs]
        if sample["prompt"].startswith("play 4") and told and told[0][0] == "user":
            told = told[1:]  # what is left of its own prompt
        for (role, ids), message in zip(told, sample["messages"], strict=False):
            assert role == message["role"]
            assert len(ids) <= 7 or role == "user"
            ids = [i for i in ids if i not in tokenizer.eos_ids]
            assert tokenizer.decode(ids, skip_special_tokens=False) == message["content"]


def test_every_end_and_limit_is_told(samples, runs):
    ends = {kind: {sample["ended"] for sample in own} for kind, own in samples.items()}
    assert ends == {
        "plain": {"done"},
        "raises": {"failed"},
        "endless": {"max_turns"},
        "long": {"max_tokens"},
        "differs": {"done"},
    }
    line = runs["true"][0][0]
    shares = {end: line[f"episodes/{end}"] for end in ("done", "max_turns", "max_drawn", "max_tokens", "failed")}
    assert shares == pytest.approx({"done": 0.4, "max_turns": 0.2, "max_drawn": 0, "max_tokens": 0.2, "failed": 0.2})
    assert [sample["turns"] for sample in samples["endless"]] == [3] * 4
    assert {sample["finish_reason"] for sample in samples["long"]} == {"length"}
    assert {sample["finish_reason"] for sample in samples["raises"]} == {"stop"}
    assert line["truncated_share"] == np.mean([s["finish_reason"] == "length" for own in samples.values() for s in own])


def test_rewards_of_turns_add_up_and_a_lost_episode_has_none(samples, runs):
    assert {sample["rewards"]["environment"] for sample in samples["plain"]} == {0.25 + 0.5}
    assert [sample["turn_rewards"] for sample in samples["plain"]] == [[0.25, 0.5]] * 4
    assert "turn_rewards" not in samples["endless"][0]
    assert {sample["rewards"]["environment"] for sample in samples["endless"]} == {None}
    for sample in samples["endless"]:  # what the policy and the environment said, together
        assert sample["rewards"][next(iter(sample["rewards"]))] == pytest.approx(len(sample["completion"]) / 100)
    assert {sample["rewards"]["asked"] for sample in samples["plain"]} == {1.0}, "the prompt is what reset gave"
    assert {kind: {sample["rewards"]["turned"] for sample in samples[kind]} for kind in ("plain", "endless")} == {
        "plain": {0.2},
        "endless": {3 / 10},
    }, "what a function reads in the instance itself"
    for sample in samples["raises"]:
        assert set(sample["rewards"].values()) == {None}
        assert sample["failure"][0] == "exception"
        assert "RuntimeError: lost" in sample["failure"][1]
    line = runs["true"][0][0]
    assert line["reward/environment/errors"] == 4
    assert line["environment/Game/failures"] == 4
    assert line["unjudged_share"] == pytest.approx(0.2)


def test_a_group_starts_alike_and_prompts_that_differ_are_read_behind_what_they_share(samples):
    for kind in ("plain", "endless"):
        assert len({sample["prompt"] for sample in samples[kind]}) == 1
    begun = [sample["trained"][0] for sample in samples["differs"]]
    assert 0 in begun, "what an episode has of its own is not trained"
    assert all(math.isfinite(sample["advantage"]) for sample in samples["differs"])


def test_tools_answer_a_policy_that_calls_them(folder, tmp_path, monkeypatch):
    """The turns are forced: a call, a call that cannot be read, two calls, and an answer."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "tools.py").write_text(TOOLS)
    said = ["[add(a=2, b=3)]", "[add(a=2, b=)]", "[add(a=1, b=1), add(a=2, b=2)]", "It is 4."]
    tokenizer = Tokenizer(ByteBackend())
    original = SlotSession.poll

    def poll(self):
        forced = []
        for number, completion in original(self):
            turn = self.turns_said = getattr(self, "turns_said", {})
            text = said[turn.setdefault(number, 0)]
            turn[number] += 1
            ids = [*tokenizer.encode(text, add_bos=False), *tokenizer.eos_ids]
            held, logprobs = self._turns[number], np.zeros(len(ids), np.float32)
            held.tokens[-len(completion.token_ids) :] = ids
            held.num_cached = 0  # what was drawn is read again as it is now
            top_ids = completion.top_ids[:1].repeat(len(ids), axis=0)
            top_logprobs = completion.top_logprobs[:1].repeat(len(ids), axis=0)
            changed = {"token_ids": np.array(ids, np.int32), "sampler_logprobs": logprobs, "policy_logprobs": logprobs}
            changed |= {"finish_reason": "eos", "stop_reason": ids[-1]}
            changed |= {"top_ids": top_ids, "top_logprobs": top_logprobs}
            forced.append((number, dataclasses.replace(completion, **changed)))
        return forced

    monkeypatch.setattr(SlotSession, "poll", poll)
    metrics, samples = start(
        folder,
        "tools",
        f"rollout.tools=[{tmp_path / 'tools.py'}:add]",
        "rollout.tool_format=llama_pythonic",
        f"tokenizer.chat_template={tmp_path / 'chat.jinja'}",
        "data.chat=true",
        "rollout.max_turns=4",
        "rollout.max_turn_tokens=40",
        "rollout.max_episode_tokens=400",
        "sampling.max_completion_length=200",
        f"rewards.functions=[{folder / 'rewards.py'}:told]",
        "grpo.steps=1",
        "grpo.prompts_per_step=1",
        "grpo.minibatches=1",
    )
    (sample, *_) = samples
    assert [message["role"] for message in sample["messages"]] == [
        *("assistant", "tool", "assistant", "tool", "assistant", "tool", "tool", "assistant")
    ]
    results = [message["content"] for message in sample["messages"] if message["role"] == "tool"]
    assert (results[0], *results[2:]) == ("5", "2", "4")
    assert "error" in results[1]
    assert sample["messages"][0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}
    text = tokenizer.decode(sample["token_ids"], skip_special_tokens=False)
    expected = f"{said[0]}<eos>t:5;{said[1]}<eos>t:{results[1]};{said[2]}<eos>t:2;t:4;{said[3]}<eos>"
    assert text == expected
    assert (sample["turns"], sample["tool_calls"], sample["ended"]) == (4, 4, "done")
    assert sum(sample["trained"]) == sum(len(turn) + 1 for turn in said)
    assert set(sample["rewards"].values()) == {8.0}, "the reward function gets all messages"
    assert metrics[0]["tool_calls/bad"] == 4
    assert metrics[0]["tool_calls/mean"] == 4


@pytest.mark.long
def test_two_processes_go_on_in_mid_episode_when_one_was_killed_as_if_it_had_not_been(folder):
    """The first of them keeps the journal of both."""
    keys = [f"rollout.environment={folder / 'game.py'}:Game", "rollout.in_order=true", "checkpoint.every=1"]
    keys += ["grpo.prompts_per_step=4", "grpo.minibatches=2", f"data.source={folder / 'seeded.jsonl'}"]
    keys += ["mesh.num_devices=null", "mesh.data=2", "mesh.fsdp=-1", "mesh.slice_is=process"]
    command = ["train", str(folder / "recipe.yml"), *keys]
    whole = Launched(folder / "whole_of_two", *command, f"output_dir={folder / 'whole_of_two'}")
    status, said = whole.end()
    assert status == 0, said
    command.append(f"output_dir={folder / 'killed_of_two'}")
    first = Launched(folder / "killed_of_two", *command)
    while "1 (pid" not in first.said.read_text():
        time.sleep(0.05)
    (folder / "kill").write_text(f"5 {first.child(1)}")
    status, said = first.end()
    assert (status, "killed by SIGKILL" in said) == (1, True), said
    assert (folder / "killed_of_two" / "journal.jsonl").stat().st_size
    status, said = Launched(folder / "killed_of_two", *command).end()
    assert status == 0, said
    one, two = folder / "whole_of_two", folder / "killed_of_two"
    assert read_samples(two) == read_samples(one)
    assert [steady(line) for line in read_metrics(two)] == [steady(line) for line in read_metrics(one)]


def test_an_environment_may_begin_again_and_all_sequences_are_trained(folder):
    metrics, samples = start(
        folder,
        "again",
        f"rollout.environment={folder / 'game.py'}:Again",
        "rollout.max_sequences=2",
        f"rewards.functions=[{{function: '{folder / 'rewards.py'}:told', weight: 0, name: told}}]",
        "grpo.prompts_per_step=3",
        "grpo.minibatches=1",
        f"data.source={folder / 'rows.jsonl'}[:3]",
    )
    tokenizer = Tokenizer(ByteBackend())
    lost = [sample for sample in samples if sample["prompt"].startswith("play 2")]
    assert {(sample["ended"], sample["turns"]) for sample in lost} == {("too_many_sequences", 2)}
    assert {sample["rewards"]["environment"] for sample in lost} == {None}
    for sample in [sample for sample in samples if sample not in lost]:
        assert (sample["ended"], sample["turns"], "trained" in sample) == ("done", 3, False)
        first, second, third = (message["content"] for message in sample["messages"] if message["role"] == "assistant")
        assert sample["rewards"]["environment"] == 1 + (len(second) + len(third)) / 8
        (further,) = sample["further"]
        assert further["prompt"] == f"again, behind {len(first)}:"
        assert further["prompt_ids"] == tokenizer.encode(further["prompt"])
        read = [i for i, trained in zip(further["token_ids"], further["trained"], strict=True) if not trained]
        assert tokenizer.decode(read) == " [on]"
        assert sample["completion"] == tokenizer.decode(sample["token_ids"] + further["token_ids"])
        assert sample["rewards"]["told"] == len(sample["completion"])
    for line in metrics:
        assert line["episodes/too_many_sequences"] == pytest.approx(1 / 3)
        assert line["drawn_difference/max"] <= 1e-4, "each sequence is trained behind the prompt it was drawn"
        assert line["grad_norm"] > 0
    assert metrics[1]["compiles"] == 0
    for sample in (lost[0], next(sample for sample in samples if sample not in lost)):  # of the first step
        place = [str(sample[name]) for name in ("step", "prompt_index", "sample_index")]
        assert sample_main(["--replay", str(folder / "again"), *place]) == 0


def test_a_run_without_data_plays_seeds_and_an_evaluation_the_same_ones_each_time_as_grpo_eval_does(
    folder, monkeypatch
):
    """Also resumed with more steps, and when it was asked to stop amid an evaluation, which the next start makes."""
    game = f"rollout.environment={folder / 'game.py'}:Seeded"
    held_out = ["data.eval_size=2", "grpo.prompts_per_step=2", "grpo.minibatches=1", "optimizer.lr=0.0", "eval.every=1"]
    turns = ["grpo.turn_advantages=all_turns", "grpo.turn_discount=0.5", "sampling.max_completion_length=10"]
    sets = ["eval.sets={again: {}, drawn: {samples: 2, max_prompts: 1}}"]
    overrides = [game, "rewards.functions=[]", *held_out, *turns, *sets, "data.source=null"]
    count, original = itertools.count(), collector.evaluate_set

    def stop(*arguments):
        if next(count) == 2:  # the first set after the first step
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(collector, "evaluate_set", stop)
    metrics, _ = start(folder, "evaluated", *overrides, "grpo.steps=1")
    assert ["eval/prompts" in line for line in metrics] == [True, False]
    assert next(count) == 3
    metrics, samples = start(folder, "evaluated", *overrides)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    assert len({sample["prompt"] for sample in samples}) == 4, "each step has prompts of its own"
    found = [
        {key: value for key, value in line.items() if key.startswith("eval/")}
        for line in metrics
        if "eval/prompts" in line
    ]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert (found[0]["eval/turns/mean"], found[0]["eval/episodes/failed"]) != (0, 1)
    result, _ = evaluate_source(folder / "evaluated", trust=True)
    metrics_of_sets = result.sets["again"].metrics() | result.sets["drawn"].metrics()
    assert result.metrics() | metrics_of_sets == found[-1]
    # A set of the held-out rows plays the very episodes; one that is drawn has several of each.
    again = {name: value for name, value in found[-1].items() if name.startswith("eval/again/")}
    for name, value in again.items():
        if name.replace("again/", "") in found[-1]:
            assert value == found[-1][name.replace("again/", "")], name
    assert again["eval/again/turns/mean"] == found[-1]["eval/turns/mean"]
    written = (folder / "evaluated" / "evaluations" / "2.jsonl").read_text().splitlines()
    episodes = [record for record in map(json.loads, written) if record.get("set") == "drawn"]
    assert [record["sample_index"] for record in episodes] == [0, 1]
    assert all(record["messages"] and record["rewards"].keys() == {"environment"} for record in episodes)
    _check_turn_advantages([line for line in metrics if "loss" in line], samples)


def _check_turn_advantages(metrics, samples):
    """The loss by hand. The weights do not move, so each ratio is 1, and the loss is less the mean over episodes of the
    mean advantage of each one's tokens.
    """
    seen = False
    for step, line in enumerate(metrics, 1):
        own = [sample for sample in samples if sample["step"] == step]
        groups = [[sample for sample in own if sample["prompt_index"] == i] for i in {s["prompt_index"] for s in own}]
        means = []
        for group in groups:
            returns = {}
            for number, sample in enumerate(group):
                if sample["rewards"]["environment"] is not None:
                    rewards = [reward or 0.0 for reward in sample["turn_rewards"]]
                    returns[number] = [
                        sum(0.5 ** (k - j) * rewards[k] for k in range(j, len(rewards))) for j in range(len(rewards))
                    ]
            flat = [value for values in returns.values() for value in values]
            for number, values in returns.items():
                want = (np.array(values) - np.mean(flat)) / (np.std(flat, ddof=1) + 1e-4)
                got = group[number]["turn_advantages"]
                np.testing.assert_allclose(got, want, atol=1e-12)
                trained = group[number].get("trained", [1] * group[number]["num_tokens"])
                lengths = [len(run) for run in "".join(map(str, trained)).split("0") if run]
                assert len(lengths) == len(values)
                means.append(np.average(want, weights=lengths))
                seen |= len(set(lengths)) > 1
        assert line["loss"] == pytest.approx(-np.mean(means), rel=1e-4, abs=1e-6)
    assert seen, "no episode has turns of different lengths"


def test_an_episode_of_a_run_is_played_again_and_says_where_its_environment_answers_otherwise(folder, samples, capsys):
    def replay(kind: str, *options: str) -> tuple[int, list[dict[str, Any]], str]:
        sample = samples[kind][2]
        place = ["1", str(sample["prompt_index"]), str(sample["sample_index"])]
        capsys.readouterr()
        status = sample_main(["--replay", str(folder / "true"), *place, *options])
        said = capsys.readouterr()
        return status, [json.loads(line) for line in said.out.splitlines()], said.err

    for kind, reward in (("plain", 0.75), ("endless", None)):
        status, lines, said = replay(kind)
        sample = samples[kind][2]
        assert (status, lines[0]["prompt"]) == (0, sample["prompt"]), said
        assert [line["content"] for line in lines[1:-1]] == [
            message["content"] for message in sample["messages"] + sample["unread"]
        ]
        assert lines[-1] == {"ended": sample["ended"], "reward": reward}
        assert "answers as samples.jsonl has it" in said
    status, lines, said = replay("raises")
    assert (status, lines[-1]["failure"], lines[-1]["ended"]) == (0, samples["raises"][2]["failure"], "failed")
    status, _, said = replay("differs")  # what reset gives does not follow from the seed
    assert (status, "NOT equal to samples.jsonl: the prompt was 'play 4" in said) == (1, True)
    (folder / "game.py").rename(folder / "moved.py")
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'game.py'}")):
        replay("plain", "--trust")
    (folder / "moved.py").rename(folder / "game.py")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.environment={g: nowhere.py:Game}"], "nowhere.py"),
        (["rollout.environment=Game"], "must be path/to/file.py:name, openenv:URL or textarena:NAME, got 'Game'"),
        (["rollout.environment={a: GAME, b: GAME}"], "column 'environment' must name one of"),
        (["rollout.environment=GAME", "rollout.max_episode_tokens=10"], "rollout.max_episode_tokens must be >= "),
        (["rollout.environment=GAME", "data.max_prompt_length=4"], "data.max_prompt_length"),
        (
            ["rollout.environment=GAME", "data.chat=true", "data.max_prompt_length=64"],
            "must end a turn with a special token",
        ),
        (["rollout.environment=GAME", "rollout.environment_weight=0"], "rewards.functions"),
        (["rollout.tools=[GAME]", "rollout.tool_format=hermes", "rewards.functions=[LENGTH]"], "Game"),
        (["rollout.environment=GAME", "rollout.episodes_per_worker=3"], "must be >= grpo.group_size (4)"),
        (
            ["rollout.environment={a: GAME, b: GAME}", "data.source=null"],
            "data.source must be set with several environ",
        ),
        (
            ["rollout.environment=GAME", "data.source=null", "data.eval_share=0.1"],
            "data.eval_share must be 0.0 without",
        ),
        (
            ["rollout.tools=[GAME]", "data.source=null", "rewards.functions=[LENGTH]"],
            "data.source must be set, got None",
        ),
    ],
)
def test_what_cannot_be_played_is_refused_before_the_run_folder_is_touched(folder, overrides, message):
    named = {"GAME": f"{folder / 'game.py'}:Game", "LENGTH": f"{folder / 'rewards.py'}:length"}
    for name, place in named.items():
        overrides = [override.replace(name, place) for override in overrides]
    with pytest.raises(ValueError, match=re.escape(message)):
        start(folder, "refused", "rewards.functions=[]", *overrides)
    assert not (folder / "refused").exists()


def test_a_turn_that_a_limit_cuts_is_judged_and_shapes_do_not_follow_the_number_of_refills(folder):
    """The first step has groups without a spread, which are drawn again, one or two at a time. Rows are read as a
    stream.
    """
    metrics, samples = start(
        folder,
        "cut",
        f"rollout.environment={folder / 'game.py'}:Game",
        "rewards.functions=[]",
        "rollout.max_turn_tokens=null",
        "sampling.max_completion_length=5",
        "grpo.steps=3",
        "grpo.prompts_per_step=2",
        "grpo.minibatches=1",
        "grpo.dynamic_sampling_rounds=2",
        "sampling.warm_up=true",
        "data.streaming=true",
    )
    cut = [sample for sample in samples if sample["ended"] == "max_drawn" and sample["turns"] == 1]
    assert cut
    assert {sample["rewards"]["environment"] for sample in cut} <= {0.25, None}
    assert all([message["role"] for message in sample["messages"]] == ["assistant"] for sample in cut)
    assert all("unread" in sample for sample in cut)
    assert [line["dynamic_sampling/rounds"] for line in metrics] == [2, 2, 2]
    assert [line["compiles"] for line in metrics[1:]] == [0, 0]


def test_a_run_that_is_killed_in_mid_episode_goes_on_as_if_it_had_not_been(folder, capsys, monkeypatch):
    """With rollout.in_order, bit for bit. The other flavour goes on from the checkpoint and the journal of the first.
    Otherwise what is in the journal is equal, and the other tokens are. A run that is asked to stop leaves its step.
    """
    game = [f"rollout.environment={folder / 'game.py'}:Game", "rollout.in_order=true", "checkpoint.every=1"]
    # Without the kind whose prompts do not follow from the seed.
    game += ["grpo.steps=3", "grpo.prompts_per_step=4", "grpo.minibatches=4", f"data.source={folder / 'seeded.jsonl'}"]
    whole, samples = start(folder, "whole", *game)
    arguments = [f"output_dir={folder / 'killed'}", *game]
    command = [sys.executable, "-m", "rl.cli", "train", str(folder / "recipe.yml"), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        (folder / "kill").write_text(f"5 {process.pid}")  # four episodes of the first step, one of the second
        process.wait(300)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "kill").exists()
    assert [line["step"] for line in read_metrics(folder / "killed")] == [1]
    metrics, again = start(folder, "killed", *game, "pure_nnx=false")
    assert re.search(r"step 2: \d+ whole episodes and \d+ begun ones are from the journal", capsys.readouterr().out)
    assert again == samples
    assert [steady(line) for line in metrics] == [steady(line) for line in whole]
    assert not (folder / "killed" / "journal.jsonl").exists()

    game, count = [*game, "rollout.in_order=false", "grpo.steps=2"], itertools.count()
    original = StepJournal.add_turn

    def stop(*arguments):
        if next(count) == 54:  # of about 2 * 32 turns
            signal.raise_signal(signal.SIGINT)
        original(*arguments)

    monkeypatch.setattr(StepJournal, "add_turn", stop)
    metrics, _ = start(folder, "cut short", *game)
    assert ([line["step"] for line in metrics], next(count) < 64) == ([1], True)
    told = capsys.readouterr()
    assert "SIGINT: leaving this step, whose episodes are kept, then saving" in told.out + told.err
    assert "saved step 1 of 2" in told.out
    monkeypatch.undo()
    metrics, again = start(folder, "cut short", *game, "pure_nnx=false")
    assert re.search(r"step 2: \d+ whole episodes and \d+ begun ones are from the journal", capsys.readouterr().out)
    expected = [sample for sample in samples if sample["step"] < 3]
    assert list(map(without_rounding, again)) == list(map(without_rounding, expected))
    assert metrics[1]["drawn_difference/max"] <= 1e-4
