"""An environment that tests name by path: it answers with the length of each turn, and ends after two to four."""

import random

from rewards.environment import Step


class Counting:
    """Answers each turn with its length. The number of turns follows from the seed."""

    def reset(self, row, seed):
        self.left = random.randint(2, 4)
        return row["prompt"]

    def step(self, message):
        self.left -= 1
        size = len(message["content"])
        return Step([{"role": "user", "content": str(size)}], reward=size / 8, done=self.left == 0)

    def close(self):
        pass
