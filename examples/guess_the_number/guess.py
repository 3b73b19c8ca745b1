"""The game, and the games that the warm start imitates."""

import random

from rewards.environment import Step

SHARE_OF_LEAPS = 0.5  # of the guesses that the warm start imitates
NUM_GAMES = 5  # of the warm start, for each row
MOST_TURNS = 10  # of a game of the warm start


class Guess:
    """Asks for the row's `number`, from 1 to its `high`. A wrong guess costs 0.1, and tells what numbers are left."""

    def reset(self, row, seed):
        self.lowest, self.highest, self.num_digits = 1, row["high"], len(str(row["high"]))
        self.number = row["number"]
        return row["prompt"]

    def step(self, message):
        said = message["content"]
        guess = int(said) if said.isascii() and said.isdecimal() else 0
        if guess == self.number:
            return Step(reward=1.0, done=True)
        self.lowest, self.highest = left(self.lowest, self.highest, guess, self.number)
        return Step([{"role": "user", "content": question(self.lowest, self.highest, self.num_digits)}], reward=-0.1)

    def close(self):
        pass


def question(lowest, highest, num_digits):
    """What the policy reads before each guess: the numbers that are left."""
    return f"{lowest:0{num_digits}}-{highest:0{num_digits}}?"


def left(lowest, highest, guess, number):
    """The numbers that are left after a wrong guess, from the lowest to the highest."""
    return (max(lowest, guess + 1), highest) if guess < number else (lowest, min(highest, guess - 1))


def games(row):
    """Turns of games by a careful player, who asks for the lowest number that is left, and now and then for any."""
    number, high, turns = row["number"], row["high"], []
    draw, num_digits = random.Random(100 * high + number), len(str(high))
    for _ in range(NUM_GAMES):
        lowest, highest = 1, high
        messages = [{"role": "user", "content": row["prompt"]}]
        for _ in range(MOST_TURNS):
            guess = draw.randint(lowest, highest) if draw.random() < SHARE_OF_LEAPS else lowest
            turns.append({"prompt": list(messages), "answer": f"{guess:0{num_digits}}"})
            if guess == number:
                break
            lowest, highest = left(lowest, highest, guess, number)
            messages.append({"role": "assistant", "content": f"{guess:0{num_digits}}"})
            messages.append({"role": "user", "content": question(lowest, highest, num_digits)})
    return turns
