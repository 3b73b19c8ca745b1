"""The game of guess_the_number on a server of OpenEnv. From the checkout:

python -m examples.openenv_game.server [PORT]      # 8000, what the recipe asks
"""

import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

from examples.guess_the_number import guess

MOST_SESSIONS = 64  # rollout.num_workers times rollout.episodes_per_worker


class Guess(Action):
    """One field of text, so that the policy's turn is its value."""

    guess: str


class Left(Observation):
    """The numbers that are left. One field of text, so that the policy reads it as it is; the row's prompt opens."""

    left: str = ""


class Game(Environment):
    """One session."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, *, high, number):
        self.game = guess.Guess()
        self.game.reset({"prompt": "", "high": high, "number": number}, seed)
        return Left(done=False)

    def step(self, action):
        step = self.game.step({"role": "assistant", "content": action.guess})
        text = "".join(message["content"] for message in step.messages)
        return Left(left=text, reward=step.reward, done=step.done)

    @property
    def state(self):
        return State()


if __name__ == "__main__":
    app = create_fastapi_app(Game, Guess, Left, max_concurrent_envs=MOST_SESSIONS)
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000, log_level="warning")
