"""An agent of openai's client in a run: its turns are those that were drawn; another history is another sequence."""

import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.metrics import read_metrics, read_samples
from rl.tools.samples.replay_episode import play_again
from tests.helpers.metric_lines import without_entry
from tests.helpers.places import ROOT
from tests.rollout.test_episodes import RECIPE, TEMPLATE

# verifiers needs openai < 3, so it may be in another environment, with Tandem's own dependencies beside it.
VF_EVAL = os.environ.get("TANDEM_VF_EVAL") or shutil.which("vf-eval")

AGENT = '''
async def run(base_url, row, api_key):
    """Asks once more, and then as often with a summary as the row says; or leads two chats, which take turns."""
    import openai

    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages = [*row["prompt"]]

    async def ask():
        answer = await client.chat.completions.create(model="policy", messages=messages)
        messages.append(answer.choices[0].message.model_dump(exclude_none=True))

    if row["times"] == 3:
        chats = [[*row["prompt"]], [{"role": "user", "content": "another"}]]
        for said in ("more", "done"):
            for messages in chats:
                await ask()
                messages.append({"role": "user", "content": said})
        return 0.25
    await ask()
    messages.append({"role": "user", "content": "more"})
    await ask()
    for time in range(row["times"]):
        messages[:] = [{"role": "user", "content": f"{len(messages)} said {time}"}]
        await ask()
    return len(messages) / 4
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("agents")
    (folder / "agent.py").write_text(AGENT)
    (folder / "chat.jinja").write_text(TEMPLATE)
    (folder / "recipe.yml").write_text(RECIPE)
    rows = [{"prompt": f"play {times}", "times": times} for times in (0, 1, 2, 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def overrides(folder: pathlib.Path, *more: str) -> list[str]:
    keys = [f"data.source={folder / 'rows.jsonl'}", "data.chat=true", f"rollout.agent={folder / 'agent.py'}:run"]
    keys += [f"tokenizer.chat_template={folder / 'chat.jinja'}", "rewards.functions=[]", "grpo.prompts_per_step=4"]
    keys += ["rollout.tool_format=hermes", "rollout.max_turns=4"]
    return [*keys, "grpo.minibatches=1", "grpo.steps=1", *more]


def runs_of(trained: list[int]) -> list[int]:
    """1 for each run of drawn tokens, 0 for each of others."""
    return [kind for kind, _ in itertools.groupby(trained)]


def test_an_agent_is_trained_by_what_was_drawn_and_another_history_is_a_sequence_of_its_own(folder):
    settings = overrides(folder, "rollout.max_sequences=2", "rollout.max_turn_tokens=5", f"output_dir={folder / 'run'}")
    path = train(load_config(folder / "recipe.yml", settings))
    (line,), samples = read_metrics(path), read_samples(path)
    assert not without_entry(line)
    by_times: dict[str, list[dict]] = {}
    for sample in samples:
        by_times.setdefault(sample["prompt"][0]["content"], []).append(sample)
    assert {name: len(own) for name, own in by_times.items()} == {f"play {times}": 4 for times in range(4)}
    for sample in by_times["play 0"]:
        assert (sample["turns"], sample["ended"], sample["rewards"]) == (2, "done", {"environment": 1.0})
        assert [message["role"] for message in sample["messages"]] == ["assistant", "user", "assistant"]
        assert 0 < sum(sample["trained"]) < len(sample["token_ids"])
    for sample in by_times["play 1"]:
        (further,) = sample["further"]
        assert (sample["turns"], sample["rewards"]) == (3, {"environment": 0.5})
        assert all(further.get("trained", [1]))
        assert len(further["token_ids"]) > 0
    for sample in by_times["play 2"]:
        assert (sample["ended"], sample["rewards"]) == ("too_many_sequences", {"environment": None})
    for sample in by_times["play 3"]:
        (further,) = sample["further"]
        assert (sample["turns"], sample["ended"], sample["rewards"]) == (4, "done", {"environment": 0.25})
        assert sample["turn_sequences"] == [0, 1, 0, 1]
        assert further["prompt"] == [{"role": "user", "content": "another"}]
        asked = [message["content"] for message in sample["messages"] if message["role"] == "user"]
        assert asked == ["more", "more"]
        for sequence in (sample, further):
            assert runs_of(sequence["trained"]) == [1, 0, 1]
    assert line["episodes/too_many_sequences"] == pytest.approx(1 / 4)
    assert line["turns/max"] == 4
    picked = by_times["play 3"][0]
    played = play_again(path, 1, picked["prompt_index"], picked["sample_index"])
    assert [told["turn"] for told in played.lines if told.get("role") == "assistant"] == [1, 2, 3, 4]
    assert played.differences == []
    assert line["drawn_difference/max"] <= 1e-4


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("data.chat=false", "data.chat must be true with rollout.agent"),
        ("rollout.environment=game.py:Game", "rollout.environment must be empty with rollout.agent"),
        ("rollout.tools=[game.py:add]", "rollout.tools must be empty with rollout.agent"),
        ("rollout.agent=agent.py", "rollout.agent must be path/to/file.py:name, got 'agent.py'"),
    ],
)
def test_what_cannot_be_with_an_agent_is_refused(folder, key, rule):
    with pytest.raises(ValueError, match=rule):
        load_config(folder / "recipe.yml", overrides(folder, key))


@pytest.mark.parametrize("role", ["tool", "user"])
def test_a_template_whose_calls_nobody_can_read_is_refused_at_the_start(folder, role):
    settings = overrides(folder, "rollout.tool_format=auto", f"rollout.tool_role={role}")
    with pytest.raises(ValueError, match=r"rollout\.tool_format must be one of hermes.* with rollout\.agent"):
        train(load_config(folder / "recipe.yml", [*settings, f"output_dir={folder / 'refused'}"]))
    assert not (folder / "refused").exists()


@pytest.mark.long
@pytest.mark.skipif(VF_EVAL is None or shutil.which("uv") is None, reason="verifiers 0.4 or uv is not installed")
def test_a_taskset_of_verifiers_is_trained_as_the_page_on_environments_shows(folder, tmp_path):
    assert VF_EVAL is not None
    page = (ROOT / "docs" / "environments.md").read_text()
    taskset, agent = re.findall(r"^```python\n(import verifiers.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "short_answers.py").write_text(taskset)
    (tmp_path / "plays.py").write_text(agent)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "task", "task": i}) + "\n" for i in range(2)))
    keys = [f"data.source={tmp_path / 'rows.jsonl'}", f"rollout.agent={tmp_path / 'plays.py'}:play", "data.chat=true"]
    keys += [f"tokenizer.chat_template={folder / 'chat.jinja'}", "rewards.functions=[]", "grpo.prompts_per_step=1"]
    keys += [
        "rollout.tool_format=hermes",
        "grpo.minibatches=1",
        "rollout.step_timeout_seconds=300",
        f"output_dir={tmp_path / 'run'}",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [pathlib.Path(VF_EVAL).with_name("python"), "-m", "rl.cli", "train", folder / "recipe.yml", *keys]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines, samples = read_metrics(tmp_path / "run"), read_samples(tmp_path / "run")
    assert [line["episodes/done"] for line in lines] == [1.0, 1.0]
    assert len(samples) == 8
    for sample in samples:
        (asked,), (said,) = sample["prompt"], sample["messages"]
        assert asked in [{"role": "user", "content": f"What is {thing}?"} for thing in ("rain", "snow")]
        assert (sample["turns"], sample["ended"]) == (1, "done")
        lengths = len(said["content"]), len(said["content"].strip())
        assert sample["rewards"]["environment"] in [1 / (1 + length) for length in lengths]
    assert len({sample["rewards"]["environment"] for sample in samples}) > 1, "there is something to learn"
