"""Games of textarena as environments, where it is installed; and what is refused."""

import importlib.util

import pytest

from tests.helpers.environments import ask, start

HAS_GAMES = importlib.util.find_spec("textarena") is not None


@pytest.mark.skipif(not HAS_GAMES, reason="textarena is not installed: pip install 'tandem-grpo[textarena]'")
def test_a_game_is_played_to_its_end_and_follows_from_the_seed():
    played = []
    with start({"guess": "textarena:GuessTheNumber-v0"}) as runner:
        assert runner.forms == {"guess": "textarena"}
        for episode in range(2):
            asked = ask(runner, episode, "begin", {"prompt": [{"role": "user", "content": "Play."}]}, 3).messages
            assert asked[0]["content"].startswith("Play.\n\nYou are Player 0. You are playing Guess The Number.")
            said, low, high = [], 1, 20
            while True:
                guess = (low + high) // 2
                reply = ask(runner, episode, "step", f"[{guess}]")
                said += [message["content"] for message in reply.messages]
                assert not any(f"[{guess}]" == text for text in said), "the policy's own move is no observation"
                if reply.done:
                    break
                assert reply.reward is None
                low, high = (guess + 1, high) if "higher" in said[-1] else (low, guess - 1)
            assert (reply.reward, reply.metrics) == (1.0, {"invalid_move": 0.0})
            played.append(said)
    assert played[0] == played[1]


@pytest.mark.skipif(not HAS_GAMES, reason="textarena is not installed: pip install 'tandem-grpo[textarena]'")
@pytest.mark.parametrize(
    ("game", "why"),
    [("Poker-v0", "must start for one player"), ("Gues", "has no game 'Gues'; it has GuessTheNumber-v0, ")],
)
def test_a_game_that_cannot_be_played_alone_is_refused_by_name(game, why):
    with pytest.raises(ValueError, match=why):
        start({"game": f"textarena:{game}"})


@pytest.mark.skipif(HAS_GAMES, reason="textarena is installed")
def test_a_game_without_its_library_names_the_extra():
    with pytest.raises(ValueError, match=r"pip install 'tandem-grpo\[textarena\]'"):
        start({"game": "textarena:GuessTheNumber-v0"})
