"""Episodes of several processes: each plays its share, all hear the same, and the run is that of one process."""

import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from typing import Any

import pytest

from rewards.environment_runner import EnvironmentReply, EnvironmentRunner
from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.rollout.shared_environments import SharedEnvironments
from rl.run.metrics import read_metrics, read_samples
from tests.helpers.metric_lines import steady
from tests.helpers.places import ROOT

GAME = """
import os
import pathlib
import random

from rewards.environment import Step

class Game:
    def reset(self, row, seed):
        self.turns, self.row = 0, row
        return f"{row['prompt']} {random.randrange(100)}:"

    def step(self, message):
        self.turns += 1
        with pathlib.Path(__file__).with_name(f"{os.getppid()}.played").open("a") as file:
            file.write("x")
        if self.row["prompt"] == "play 1" and self.turns == 2:
            raise RuntimeError("lost")
        text = f" [{len(message['content'])}{random.randrange(10)}]"
        return Step([{"role": "user", "content": text}], len(message["content"]) / 8, self.turns == 3)

    def close(self):
        pass
"""
RECIPE = """
seed: 1
model:
  arch: {hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}
data: {source: rows.jsonl, columns: {answer: null}, max_prompt_length: 24}
sampling: {max_completion_length: 24, temperature: 0.7, slots: 8}
rollout: {environment: "game.py:Game", max_turn_tokens: 7, max_turns: 3, max_episode_tokens: 64, in_order: true}
grpo: {steps: 2, prompts_per_step: 4, group_size: 4, beta: 0.0}
optimizer: {lr: 1.0e-3}
mesh: {data: 2, fsdp: 1}
logging: {samples_per_step: 16}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("shared_environments")
    (folder / "game.py").write_text(GAME)
    (folder / "recipe.yml").write_text(RECIPE)
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "play {i}"}}\n' for i in range(4)))
    return folder


class Processes:
    """The gather of two processes, which are threads here."""

    def __init__(self) -> None:
        self._sent = [[queue.Queue() for _ in range(2)] for _ in range(2)]

    def gather_of(self, process: int) -> Any:
        def gather(value: Any) -> list[Any]:
            for other in range(2):
                self._sent[process][other].put(json.dumps(value))
            return [json.loads(self._sent[other][process].get(timeout=60)) for other in range(2)]

        return gather


def test_every_process_hears_the_replies_of_all_in_one_order(folder):
    processes = Processes()
    heard: list[list[EnvironmentReply]] = [[], []]
    refused: list[str] = []

    def play(process: int) -> None:
        limits = {"step_timeout_seconds": 20.0, "episode_timeout_seconds": 60.0}
        limits |= {"num_workers": 1, "max_episodes_per_worker": 4}
        with EnvironmentRunner({"game": f"{folder / 'game.py'}:Game"}, [], **limits) as runner:
            shared = SharedEnvironments(runner, process, 2, processes.gather_of(process))
            assert shared.environment_of({}) == "game"
            for episode in (0, 1):
                try:
                    shared.begin(episode, {"prompt": "bad", "value": object()}, 7)
                except ValueError as error:
                    refused.append(str(error))
            for episode in range(4):
                shared.begin(episode, {"prompt": f"play {episode % 2}"}, 7)
            asked = {"begin": 4}
            while sum(asked.values()):
                for reply in shared.poll(0.05):
                    heard[process].append(reply)
                    asked[reply.op] -= 1
                    following = {"begin": "step", "step": "finish"}.get(reply.op)
                    if following == "step":
                        shared.step(reply.episode, "abcd")
                    elif following == "finish":
                        shared.finish(reply.episode, "done")
                    if following:
                        asked[following] = asked.get(following, 0) + 1
            shared.drop_all()

    threads = [threading.Thread(target=play, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 4, "both processes refuse a row that cannot be sent, whoever plays it"
    assert heard[0] == heard[1]
    assert sorted((reply.op, reply.episode) for reply in heard[0]) == sorted(
        (op, episode) for op in ("begin", "step", "finish") for episode in range(4)
    )
    assert {reply.reward for reply in heard[0] if reply.op == "step"} == {0.5}


@pytest.mark.long
def test_two_processes_play_the_episodes_of_one_bit_for_bit(folder):
    keys = [f"data.source={folder / 'rows.jsonl'}", f"rollout.environment={folder / 'game.py'}:Game"]
    one = train(load_config(folder / "recipe.yml", [*keys, "mesh.num_devices=2", f"output_dir={folder / 'one'}"]))
    for mark in folder.glob("*.played"):
        mark.unlink()
    command = [sys.executable, "-m", "rl.cli", "launch", "--processes", "2", "--cpu-devices", "1", "--", "train"]
    command += [str(folder / "recipe.yml"), *keys, f"output_dir={folder / 'two'}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_samples(one) == read_samples(folder / "two")
    for line, other in zip(read_metrics(one), read_metrics(folder / "two"), strict=True):
        line, other = steady(line), steady(other)
        assert line.pop("episodes/failed") == other.pop("episodes/failed") == 0.25
        line, other = ({key: repr(value) for key, value in each.items() if key != "compiles"} for each in (line, other))
        assert line == other
    played = [len(mark.read_text()) for mark in folder.glob("*.played")]
    assert len(played) >= 2, "both processes have workers that play"
