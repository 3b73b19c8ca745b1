"""Games of textarena for one player: `rollout.environment: "textarena:GuessTheNumber-v0"`.

In: the name of a game. Out: a player for each episode. The game's messages are messages of the user, as it writes them;
its wrappers, which write the whole history each time, are left out. A game that needs other players, a download or a
key is refused at the start.
"""

from collections.abc import Mapping
from typing import Any

from rewards.environment import Message, Step
from rewards.extras import import_extra
from rewards.openenv_environment import opened

INSTALL = "tandem-grpo[textarena]"
_PLAYER = 0


def import_game(name: str, label: str) -> Any:
    """A function that makes the game. ValueError, beginning with `label`, where it cannot be played alone and here."""
    try:
        library = import_extra("textarena", INSTALL, "a textarena game")
    except ModuleNotFoundError as error:
        raise ValueError(f"{label}: {error}") from error
    known = import_extra("textarena.envs.registration", INSTALL, "a textarena game").ENV_REGISTRY
    raw = name if name.endswith("-raw") else f"{name}-raw"
    if raw not in known:
        alike = sorted(one.removesuffix("-raw") for one in known if one.endswith("-raw") and one[:4] == name[:4])
        raise ValueError(f"{label}: textarena has no game {name!r}; it has {', '.join(alike[:8]) or 'other names'}")

    def make() -> Any:
        return library.make(raw)

    try:
        make().reset(num_players=1, seed=0)
    except Exception as error:
        raise ValueError(
            f"{label}: the game {name} must start for one player without a download, and does not: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    return make


class TextArenaPlayer:
    """One episode of a game that `make` makes. instance: the game, once it is reset."""

    def __init__(self, make: Any):
        self._make = make
        self.functions: Mapping[str, Any] = {}
        self.instance: Any = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        """The prompt of the row, if it has one, and what the game says first."""
        self.instance = self._make()
        self.instance.reset(num_players=1, seed=seed)
        return opened(row, self._said())

    async def step(self, message: Message) -> Step:
        """A move."""
        done, _ = self.instance.step(action=message["content"])
        said = self._said()
        messages = [{"role": "user", "content": said}] if said else []
        if not done:
            return Step(messages)
        given, facts = self.instance.close()
        reward = None if given is None else given.get(_PLAYER)
        metrics = {"invalid_move": bool(facts.get(_PLAYER, {}).get("invalid_move", False))}
        return Step(messages, reward, True, metrics)

    async def finish(self) -> tuple[Any, Any]:
        """Nothing: the reward comes with the last move."""
        return None, {}

    async def close(self, reason: str | None) -> None:
        """Nothing: a game holds nothing."""

    def _said(self) -> str:
        """What the game has said since it was asked last, without the policy's own moves."""
        _, messages = self.instance.get_observation()
        return "\n".join(text for sender, text, *_ in messages if sender != _PLAYER)
