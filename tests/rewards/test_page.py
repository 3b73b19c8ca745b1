"""docs/rewards.md: every block of it runs, and gives what the page says."""

import re

import pytest

from rewards.contract import RewardSpec
from rewards.environment_rewards import EpisodeFacts
from rewards.gold import check_on_gold
from rewards.moment import Moment
from rewards.runner import RewardRunner
from rl.config.load import load_config
from tests.helpers.environments import GUESS, ask, start, writer
from tests.helpers.pages import blocks, texts

PAGE = "docs/rewards.md"
# Of the completions below: the right answer, a longer one, a wrong one, a polite one.
COMPLETIONS = ["4", "it is 4", "5", "please 5 or 6"]
REWARDS = {
    "polite": [0.0, 0.0, 0.0, 1.0],
    "exact": [2.0, 0.0, 0.0, 0.0],
    "shorter_than_most": [0.5, 0.25, 0.5, 0.0],
    "shortest_right": [1.0, 0.0, 0.0, 0.0],
    "close": [1.0, 1.0, 0.075, 0.075],
    "graded": [1.0, 1.0, 0.0, 0.0],
    "reward_func": [1.0, 1.0, 0.0, 0.0],
    "in_words": [1.0, 1.0, 0.0, 0.0],
}


@pytest.mark.long
def test_every_block_of_the_page_on_rewards_runs(tmp_path, monkeypatch):
    code = "\n\n".join(texts(PAGE, "python"))
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    functions = re.findall(r"^def (\w+)", code, re.MULTILINE)
    assert [name for name in functions if name != "few_guesses"] == [*REWARDS]
    game = writer(tmp_path)(GUESS)
    few = RewardSpec("few", "my_rewards.py:few_guesses", 1.0, {})
    with start(game("Guess"), rewards=[few]) as environments:
        ask(environments, 0, "begin", {"prompt": "?", "number": 3}, 0)
        for guess in "123":
            ask(environments, 0, "step", guess)
        facts = EpisodeFacts("?", "3", [3], "eos", 0, Moment())
        assert ask(environments, 0, "finish", "done", facts).judged == {"few": pytest.approx(1 / 3)}
    kwargs = {"exact": {"right": 2.0}}
    specs = [RewardSpec(name, f"my_rewards.py:{name}", 1.0, kwargs.get(name, {})) for name in REWARDS]
    with RewardRunner(specs, ["answer"], 2, 5.0, rows=[("2+2=", {"answer": "4"})]) as runner:
        groups = {name for name, calls in runner.calls.items() if calls == "needs_group"}
        assert groups == {"shorter_than_most", "shortest_right"}
        columns = {"answer": ["4"] * 4}
        result = runner.score(["2+2="] * 4, COMPLETIONS, columns, group_size=4, moment=Moment(1, 4, 0.5))
        assert check_on_gold(runner, "2+2=", "4", {"answer": "4"}) == []
    assert result.problems == []
    assert {name: [row[key] for row in result.rewards] for key, name in enumerate(REWARDS)} == {
        name: pytest.approx(rewards) for name, rewards in REWARDS.items()
    }
    assert result.sums["close"]["right"][0] / result.sums["close"]["right"][1] == 0.5
    assert result.logged[1]["close"] == {"found": "4"}  # as the page says
    assert result.logged[1]["graded"] == {"score": 1.0, "words": 3, "first": "it"}


def test_the_recipe_on_the_page_on_rewards_is_one(tmp_path):
    (recipe,) = texts(PAGE, "yaml")
    (tmp_path / "recipe.yml").write_text(recipe)
    functions = load_config(tmp_path / "recipe.yml").rewards.functions
    assert {function.function for function in functions} <= {f"my_rewards.py:{name}" for name in REWARDS}
    assert {block.language for block in blocks(PAGE)} == {"python", "yaml"}
