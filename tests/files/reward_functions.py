"""Reward functions that tests name by path."""

import functools
import json
import os
import pathlib
import subprocess

from rewards.contract import elementwise


@elementwise
def digit_share(prompts, completions, **columns):
    """Share of the characters that are digits: a random byte policy scores about 0.04."""
    return [sum(character in "0123456789" for character in text) / max(len(text), 1) for text in completions]


@elementwise
def constant(prompts, completions, **columns):
    """The same for everyone: nothing to learn."""
    return [0.5 for _ in completions]


@elementwise
def always_right(prompts, completions, **columns):
    """1 for everyone."""
    return [1.0 for _ in completions]


@elementwise
def tells_the_moment(prompts, completions, trainer_state, log_metric, log_extra, **columns):
    """Logs where the run stands and what was said, as a function of TRL does."""
    for name in ("global_step", "max_steps", "epoch"):
        log_metric(name, getattr(trainer_state, name))
    log_extra("said", completions)
    return [0.0 for _ in completions]


def right_for_even_answers(completion, answer):
    """1 where the gold answer is even, whatever the completion."""
    return float(int(answer) % 2 == 0)


def flat_for_even_answers(completion, answer):
    """The same for all completions of a prompt whose gold answer is even; else the share of low characters."""
    if int(answer) % 2 == 0:
        return 0.5
    return sum(ord(character) < 90 for character in completion) / max(len(completion), 1)


@elementwise
def huge(prompts, completions, **columns):
    """With a weight of 1e30 it is finite, but the squares of its gradient are not in float32: no update can be made."""
    return [sum(map(ord, text)) for text in completions]


def huge_for_even_answers(completion, answer):
    """The same for some prompts only."""
    return (1.0 if int(answer) % 2 == 0 else 1e-33) * sum(map(ord, completion))


def low_characters(completion):
    """The share of low characters, of one completion by itself."""
    return sum(ord(character) < 90 for character in completion) / max(len(completion), 1)


@functools.cache
def run_process():
    """The process of the run: the parent of the supervisor, whose child a worker is."""
    command = ["ps", "-o", "ppid=", "-p", str(os.getppid())]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def recorded(completion, folder):
    """Notes what it judged, under the process of the run whose worker this is."""
    with (pathlib.Path(folder) / f"{run_process()}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(completion) + "\n")
    return 0.0


def recorded_batch(completions, folder):
    """The same for one call with the whole batch."""
    with (pathlib.Path(folder) / f"{run_process()}-batches.jsonl").open("a") as file:
        file.write(json.dumps(completions) + "\n")
    return [0.0] * len(completions)


recorded_batch.elementwise = False


def rank_in_batch(prompts, completions, **columns):
    """The place of each among all completions of the batch, from 0 to 1: it needs the whole batch."""
    order = sorted(range(len(completions)), key=lambda b: completions[b])
    return [order.index(b) / len(completions) for b in range(len(completions))]


def best_of_group(prompts, completions, **columns):
    """1 for the longest completions of each prompt: alone, every completion is the best."""
    best = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        best[prompt] = max(best.get(prompt, 0), len(completion))
    return [float(len(text) == best[prompt]) for prompt, text in zip(prompts, completions, strict=True)]
