"""docs/environments.md: every block of it runs, and gives what the page says. Those about verifiers run in
tests/rollout/test_agents.py.
"""

import pytest

from rl.config.load import load_config
from tests.helpers.environments import ask, hermes, start
from tests.helpers.pages import blocks, texts

PAGE = "docs/environments.md"
ROW = {"prompt": "Which number?", "number": 25}


@pytest.mark.long
def test_every_block_of_the_page_on_environments_runs(tmp_path, monkeypatch):
    code = "\n\n".join(text for text in texts(PAGE, "python") if "verifiers" not in text)
    (tmp_path / "my_game.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(code, "my_game.py", "exec"), namespace)
    begun, lower, right, ended = namespace["play"]("my_game.py:Guess", ["50", "25"], ROW)
    assert (begun.messages, lower.messages) == ("Which number?", [{"role": "user", "content": "lower"}])
    assert (lower.metrics, right.reward, right.done, ended.failure) == ({"wrong": 1.0}, 0.5, True, None)
    calls = [hermes("guess", number=50), hermes("guess", number=25), "It is 25."]
    begun, lower, right, last, ended = namespace["play"]("my_game.py:GuessForTRL", calls, ROW)
    assert (begun.messages, last.done, ended.reward) == ("Which number?", True, 0.5)
    assert [reply.messages[0]["content"] for reply in (lower, right)] == ["lower", "right"]
    chat = {**ROW, "prompt": [{"role": "user", "content": "Which number?"}]}
    _, lower, right, _ = namespace["play"]("my_game.py:GuessForSkyRL", ["50", "25"], chat)
    assert (lower.messages[0]["content"], lower.reward, right.reward) == ("lower", 0.0, 0.5)
    with start({"agent": "agent:my_game.py:run"}) as runner:
        ask(runner, 0, "begin", {"prompt": chat["prompt"], "answer": "25"}, 0)
        assert ask(runner, 0, "step", "24").messages[0]["content"] == "Are you sure?"
        assert ask(runner, 0, "step", "No, 25.").reward == 1.0
    with start(tools=["my_game.py:add"], tool_format="hermes") as runner:
        ask(runner, 0, "begin", {"prompt": "p"}, 0)
        assert ask(runner, 0, "step", hermes("add", a=1, b=2)).messages[0]["content"] == "3"


def test_the_recipes_on_the_page_on_environments_are_some(tmp_path):
    assert {block.language for block in blocks(PAGE)} == {"python", "yaml"}
    named = set()
    for recipe in texts(PAGE, "yaml"):
        (tmp_path / "recipe.yml").write_text(recipe)
        rollout = load_config(tmp_path / "recipe.yml").rollout
        named |= {*rollout.environments.values(), *rollout.tools}
    assert named == {"my_game.py:Guess", "my_game.py:add", "agent:my_agent.py:run", "agent:plays.py:play"}
