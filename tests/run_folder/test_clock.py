"""A chat template that writes the date writes that of the run's start, whenever the run goes on."""

import json

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.metrics import read_samples
from rl.run_folder import clock
from rl.state.origin import tokenizer_from_config
from rl.tools.evaluate import evaluate_source

TEMPLATE = "{{ strftime_now('%d %b %Y') }} {% for message in messages %}{{ message.content }}{% endfor %}"
RECIPE = """
model:
  arch: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}
data: {source: arithmetic, args: {operation: add, digits: 1}, eval_size: 2, chat: true, max_prompt_length: 32}
rewards: {functions: ["rewards.number:exact_number_flexible"]}
sampling: {max_completion_length: 4, slots: 8}
grpo: {prompts_per_step: 2, group_size: 2, beta: 0.0}
mesh: {num_devices: 1}
"""


def test_a_run_that_goes_on_another_day_has_the_prompts_of_its_first_day(tmp_path, monkeypatch, capsys):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    overrides = [f"output_dir={tmp_path / 'run'}", f"tokenizer.chat_template={tmp_path / 'chat.jinja'}"]

    def config(steps: int):
        return load_config(tmp_path / "recipe.yml", [*overrides, f"grpo.steps={steps}"])

    monkeypatch.setattr(clock, "_now", lambda: "2026-01-02T10:00:00")
    train(config(1))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["clock"] == "2026-01-02T10:00:00"
    monkeypatch.setattr(clock, "_now", lambda: "2026-03-04T10:00:00")
    train(config(2))
    assert {sample["step"] for sample in read_samples(tmp_path / "run")} == {1, 2}
    assert "date of the day" not in capsys.readouterr().out
    asked = [{"role": "user", "content": "1+1="}]
    assert tokenizer_from_config(config(2)).render_chat(asked) == "02 Jan 2026 1+1="
    evaluate_source(tmp_path / "run", trust=True)  # its held-out rows are those of the run
    assert "held-out rows" not in capsys.readouterr().err
    overrides.append("checkpoint.overwrite=true")
    assert tokenizer_from_config(config(2)).render_chat(asked) == "04 Mar 2026 1+1="
