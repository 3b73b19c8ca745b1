"""Reward functions that ask for `environments`: called beside the instance of each episode, before it is closed."""

import re

import pytest

from rewards.contract import RewardSpec, bind
from rewards.environment_rewards import EpisodeFacts, asks_for_environments
from rewards.moment import Moment
from tests.helpers.environments import ask, replies_of, start, writer

GAMES = """
    from rewards.environment import Step

    class Own:
        is_closed = False

        def reset(self, row, seed):
            self.number, self.guesses = row["number"], []
            return row["prompt"]

        def step(self, message):
            self.guesses.append(int(message["content"]))
            return Step(reward=0.25, done=True)

        def close(self):
            self.is_closed = True

    class Trl:
        def reset(self, **row):
            self.is_closed, self.number, self.guesses = False, row["number"], [7]

        def guess(self, number: int) -> str:
            '''Guesses.

            Args:
                number: any
            '''
            self.guesses.append(number)
            return "no"

        def get_reward(self):
            return 0.25

    class Sky:
        is_closed = False

        def __init__(self, env_config, extras):
            self.number, self.guesses = extras["number"], []

        def init(self, prompt):
            return prompt, {}

        def step(self, action):
            self.guesses.append(int(action))
            return {"observations": [], "reward": 0.25, "done": True, "metadata": {}}

        def close(self):
            self.is_closed = True
"""
REWARDS = """
    import asyncio
    import os
    import random
    import time

    def near(environments, completions, number, **columns):
        assert not any(game.is_closed for game in environments)
        assert {"completion_ids", "log_metric", "prompts", "trainer_state"} <= {*columns}
        return [-abs(game.number - game.guesses[-1]) - int(columns["trainer_state"].global_step != 3)
                for game in environments]

    async def single(prompt, completion, environments, seed, finish_reason, log_metric, number=None, scale=1.0):
        await asyncio.sleep(0)
        log_metric("guesses", len(environments.guesses))
        return scale * (number + len(environments.guesses)) if finish_reason == "eos" and seed == 5 else None

    def fails(environments, completions):
        game, = environments
        what = {1: lambda: 1 / 0, 2: lambda: time.sleep(100), 3: lambda: os._exit(3)}
        what.get(game.number, int)()
        return ["no number"] if game.number == 4 else [float(game.number)] * (1 + (game.number == 5))

    def compares(environments, completions, group):
        return [0.0]
"""
TEXT = [{"role": "user", "content": "Which number?"}]
COMPLETION = [{"role": "assistant", "content": "7"}]
FACTS = EpisodeFacts(TEXT, COMPLETION, [1, 2], "eos", 5, Moment(3, 10))


def spec(reference: str, **kwargs) -> RewardSpec:
    return RewardSpec(reference.rpartition(":")[2], reference, 1.0, kwargs)


@pytest.mark.parametrize("form", ["Own", "Trl", "Sky"])
def test_functions_judge_beside_the_instance_of_their_episode_in_every_form(tmp_path, form):
    write = writer(tmp_path)
    games, rewards = write(GAMES, "games"), write(REWARDS, "rewards")
    own = [spec(rewards("near")), spec(rewards("single"), scale=2.0)]
    with start(games(form), rewards=own, columns=["number"], tool_format="hermes") as runner:
        for episode, number in ((0, 9), (1, 4)):
            ask(runner, episode, "begin", {"prompt": TEXT, "number": number}, 0)
            ask(runner, episode, "step", "7")
            ended = ask(runner, episode, "finish", "done", FACTS)
            assert ended.judged == {"near": -abs(number - 7), "single": 2.0 * (number + 1)}
            assert (ended.failure, ended.metrics) == (None, {"single/guesses": 1.0})
            assert ended.reward == (0.25 if form == "Trl" else None)
        ask(runner, 2, "begin", {"prompt": TEXT, "number": 9}, 0)
        assert ask(runner, 2, "finish", "failed").judged == {}, "nothing is judged of an episode that is lost"


def test_what_a_function_does_wrong_costs_its_reward_and_not_the_episode(tmp_path):
    write = writer(tmp_path)
    games, rewards = write(GAMES, "games"), write(REWARDS, "rewards")
    own, options = [spec(rewards("near")), spec(rewards("fails"))], {"step_timeout_seconds": 1.0}
    log = tmp_path / "log"
    with start(games("Own"), rewards=own, columns=["number"], log_path=log, **options) as runner:
        for episode in range(7):
            runner.begin(episode, {"prompt": TEXT, "number": episode}, 0)
        replies_of(runner, 7)
        for episode in range(7):
            runner.step(episode, "7")
        replies_of(runner, 7)
        for episode in range(7):
            runner.finish(episode, "done", FACTS)
        ended = replies_of(runner, 7)
    assert {reply.failure for reply in ended.values()} == {None}
    judged = {episode: reply.judged["fails"] for episode, reply in ended.items()}
    assert (judged[0], judged[6]) == (0.0, 6.0)
    kinds = {episode: value[0] for episode, value in judged.items() if isinstance(value, tuple)}
    assert kinds == {1: "exception", 2: "timeout", 3: "died", 4: "not_a_number", 5: "wrong_length"}
    assert "ZeroDivisionError" in judged[1][1]
    assert "(rewards.py:" in judged[1][1]
    assert [ended[episode].judged["near"] for episode in (0, 1, 4)] == [-7, -6, -3]
    assert log.read_text().count("ZeroDivisionError") == 1


def test_what_cannot_be_called_so_is_refused_at_the_start(tmp_path):
    write = writer(tmp_path)
    games, rewards = write(GAMES, "games"), write(REWARDS, "rewards")
    with pytest.raises(ValueError, match="a function that asks for environments gets no 'group'"):
        start(games("Own"), rewards=[spec(rewards("compares"))])
    with pytest.raises(ValueError, match="nothing provides the argument 'number'"):
        start(games("Own"), rewards=[spec(rewards("near"))])
    whole = RewardSpec("near", rewards("near"), 1.0, {}, "whole_batch")
    with pytest.raises(ValueError, match="is called for one episode at a time"):
        start(games("Own"), rewards=[whole], columns=["number"])


def test_a_function_that_asks_is_found_without_running_it_and_refused_where_there_are_none(tmp_path):
    rewards = writer(tmp_path)(REWARDS + "\n    other = near\n    1 / 0\n")
    assert [asks_for_environments(rewards(name), ()) for name in ("near", "single", "fails")] == [True] * 3
    assert not asks_for_environments(rewards("near"), ["environments"])
    assert not asks_for_environments(rewards("other"), ())
    assert not asks_for_environments("rewards.number:exact_number_strict", ())
    assert not asks_for_environments(str(tmp_path / "no.py:near"), ())

    def near(environments, completions):
        return [0.0]

    with pytest.raises(ValueError, match=re.escape("there are none: set rollout.environment; with it, the file that")):
        bind(near, [], {}, "near")
    assert bind(near, ["environments"], {}, "near").columns == ("environments",)
