"""Episodes that raise, hang, die, lie and hold memory, many at a time and in any order, among innocent ones."""

import random

import pytest

from tests.helpers.environments import start, writer

GAMES = """
    import asyncio, ctypes, os, random, signal, sys, threading, time
    import numpy as np
    from rewards.environment import Step

    def misbehave(what):
        if what == "raise":
            raise RuntimeError("no")
        if what == "exit":
            sys.exit(3)
        if what == "hang":
            time.sleep(100)
        if what == "die":
            os._exit(5)
        if what == "segfault":
            ctypes.string_at(0)
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "lie":
            return Step([{"role": "user", "content": 1}], reward=float("nan"))
        if what == "recursion":
            return misbehave(what)
        if what == "orphan":  # a child that outlives its worker
            if os.fork() == 0:
                time.sleep(100)
        text = f"{what} {random.random()} {np.random.randn()}"
        return Step([{"role": "user", "content": text}], reward=random.random())

    class Plain:
        def reset(self, row, seed):
            return f"{row['prompt']} {random.random()}"

        def step(self, message):
            return misbehave(message["content"])

        def close(self):
            pass

    class Async:
        async def reset(self, row, seed):
            await asyncio.sleep(0)
            return f"{row['prompt']} {random.random()}"

        async def step(self, message):
            await asyncio.sleep(0.002 * random.random())
            if message["content"] == "wait":
                await asyncio.sleep(100)
            return misbehave(message["content"])

        async def close(self):
            await asyncio.sleep(0)
"""
EXPECTED = {
    **dict.fromkeys(("raise", "exit", "recursion"), "exception"),
    **dict.fromkeys(("hang", "stop", "wait"), "timeout"),
    **dict.fromkeys(("die", "segfault"), "died"),
    "lie": "not_a_step",
}


def play(runner, plans, rng):
    """The replies to each episode's turns; the requests stand in an order drawn by rng."""
    heard = {episode: [] for episode in plans}
    for episode, (name, _) in plans.items():
        runner.begin(episode, {"prompt": "p", "environment": name}, episode)
    open_episodes = {*plans}
    while open_episodes:
        replies = runner.poll(60.0)
        assert replies, (open_episodes, heard)
        rng.shuffle(replies)
        for reply in replies:
            heard[reply.episode].append(reply)
            turns = plans[reply.episode][1]
            if reply.op == "finish":
                open_episodes.discard(reply.episode)
            elif reply.failure is None and len(heard[reply.episode]) <= len(turns):
                runner.step(reply.episode, turns[len(heard[reply.episode]) - 1])
            else:
                runner.finish(reply.episode, "done")
    assert runner.poll(0.0) == []
    return heard


@pytest.mark.parametrize(
    ("seed", "num_episodes"), [(26, 20), *(pytest.param(seed, 60, marks=pytest.mark.long) for seed in range(1, 6))]
)
def test_every_request_gets_one_reply_and_innocent_episodes_play_as_if_alone(tmp_path, seed, num_episodes):
    rng = random.Random(seed)
    game = writer(tmp_path)(GAMES)
    environments = {"plain": game("Plain"), "async": game("Async")}
    plans, guilty = {}, {}
    for episode in range(num_episodes):
        name = rng.choice([*environments])
        turns = [rng.choice(["a", "b", "orphan"]) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3:
            place = rng.randrange(len(turns))
            what = rng.choice([*EXPECTED])
            turns[place] = "die" if what == "wait" and name == "plain" else what
            guilty[episode] = place, EXPECTED[turns[place]]
        plans[episode] = name, turns
    assert 0 < len(guilty) < num_episodes
    options = {"num_workers": 2, "max_episodes_per_worker": 7, "step_timeout_seconds": 0.7}
    with start(environments, **options) as runner:
        heard = play(runner, plans, rng)
    for episode, (_, turns) in plans.items():
        place, kind = guilty.get(episode, (len(turns), None))
        failures = [reply.failure and reply.failure[0] for reply in heard[episode]]
        assert {*failures[: place + 1]} == {None}, (episode, plans[episode], heard[episode])
        assert failures[place + 1] == kind, (episode, plans[episode], heard[episode])
        assert len(failures) == place + 2 + (episode in guilty)
    innocent = {episode: plan for episode, plan in plans.items() if episode not in guilty}
    with start(environments, **{**options, "num_workers": 1, "max_episodes_per_worker": 1}) as runner:
        alone = play(runner, innocent, rng)
    for episode, replies in alone.items():
        assert [reply.messages for reply in heard[episode]] == [reply.messages for reply in replies]
        assert [reply.reward for reply in heard[episode]] == [reply.reward for reply in replies]
