"""From prompts to scored completions: who is judged when, and in which order the results stand."""

import time

import jax
import numpy as np

from rewards.contract import RewardSpec
from rewards.runner import RewardRunner
from rl.data import PromptRow
from rl.metrics import Stopwatch
from rl.rollout import sample_and_score
from rl.sampling import SamplingParams
from rl.scheduling import Completion


class Letters:
    """Stands in for a tokenizer: token i is the i-th letter."""

    def decode(self, ids):
        return "".join(chr(ord("a") + int(token)) for token in ids)


class OneByOne:
    """Stands in for a sampler whose completions end in the opposite order, each only once `waits_for` holds."""

    def __init__(self, waits_for):
        self.waits_for = waits_for

    def stream(self, params, prompts, requests, sampling, key):
        for number in reversed(range(len(requests))):
            request = requests[number]
            tokens = np.array([request.prompt, request.sample_index], np.int32)
            zeros, none = np.zeros(2, np.float32), np.zeros((2, 0), np.float32)
            completion = Completion(
                request.prompt_index, request.sample_index, tokens, zeros, zeros, "length", None, none, none
            )
            yield number, completion
            assert self.waits_for(tokens)


def test_completions_are_judged_while_others_are_drawn_and_stand_in_order(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        f"def judge(completion, answer):\n"
        f"    open(f'{tmp_path}/judged_{{completion}}', 'w').close()\n"
        f"    return float(completion == answer)\n"
    )

    def is_judged(tokens):
        deadline, file = time.monotonic() + 10, tmp_path / f"judged_{Letters().decode(tokens)}"
        while time.monotonic() < deadline and not file.exists():
            time.sleep(0.01)
        return file.exists()

    rows = [PromptRow(p, np.array([1, 2]), {"answer": a}, 0) for p, a in (("x", "ab"), ("y", "ba"), ("z", "zz"))]
    watch = Stopwatch()
    with RewardRunner([RewardSpec("judge", f"{path}:judge", 1.0, {})], ["answer"], 1, 5.0) as runner:
        scored = sample_and_score(
            OneByOne(is_judged), {}, rows, 2, SamplingParams(2), jax.random.key(0), runner, Letters(), watch
        )
    assert scored.texts == ["aa", "ab", "ba", "bb", "ca", "cb"]
    assert scored.result.rewards == [[0.0], [1.0], [1.0], [0.0], [0.0], [0.0]]
    assert [[c.sample_index for c in group] for group in scored.completions] == [[0, 1]] * 3
    assert {"seconds/rollout", "seconds/reward"} <= watch.lap().keys()
