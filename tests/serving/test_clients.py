"""lm-eval and verifiers, from wherever they are installed, against the endpoint."""

import json
import os
import shutil
import subprocess
from typing import Any

import pytest

from rl.cli import main
from rl.data.tokenizer import load_tokenizer
from tests.helpers.serving import SMALL, beside, write_model

# Packages of their own size: they may be in another environment, whose program the variable names.
LM_EVAL = os.environ.get("TANDEM_LM_EVAL") or shutil.which("lm_eval")
VF_EVAL = os.environ.get("TANDEM_VF_EVAL") or shutil.which("vf-eval")
TASK = """\
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROWS = [
    {"question": "one and", "choices": [" two", " a long ending", "!"], "answer": 0},
    {"question": "up", "choices": [" down", "s"], "answer": 1},
]


@pytest.mark.long
@pytest.mark.skipif(LM_EVAL is None, reason="lm-eval is not installed: pip install 'lm-eval[api]' transformers")
def test_lm_eval_finds_the_log_probs_that_grpo_sample_writes(tmp_path, capfd):
    assert LM_EVAL is not None
    folder = write_model(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "endings.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))

    def ask(url: str) -> Any:
        arguments = f"model=policy,base_url={url}/v1/completions,tokenizer={folder},num_concurrent=2,add_bos_token=True"
        command = [LM_EVAL, "--model", "local-completions", "--tasks", "endings", "--include_path", str(tmp_path)]
        command += ["--model_args", arguments, "--log_samples", "--output_path", str(tmp_path / "out")]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            env.pop(name, None)
        subprocess.run(command, check=True, env=env, cwd=tmp_path)

    status, _ = beside(folder, ask)
    assert status == 0
    (file,) = (tmp_path / "out").rglob("samples_endings_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    found = [[float(reply[0][0]) for reply in sample["resps"]] for sample in samples]
    tokenizer = load_tokenizer(folder)
    capfd.readouterr()
    for row, values in zip(ROWS, found, strict=True):
        for choice, value in zip(row["choices"], values, strict=True):
            text = row["question"] + choice
            arguments = ["--prompt", text, "--prompt-logprobs", "sampling.max_completion_length=1", *SMALL[:2]]
            assert main(["sample", str(folder), *arguments, "mesh.num_devices=1"]) == 0
            own = json.loads(capfd.readouterr().out)["prompt_logprobs"]
            assert value == pytest.approx(sum(own[len(tokenizer.encode(row["question"])) :]), abs=1e-4)


TASKSET = """\
import verifiers.v1 as vf


class Data(vf.TaskData):
    answer: str = "a"


class Task(vf.Task[Data]):
    @vf.reward(weight=1.0)
    async def reward(self, trace: vf.Trace) -> float:
        return float(self.data.answer in (trace.last_reply or ""))


class Taskset(vf.Taskset[Task, vf.TasksetConfig]):
    def load(self) -> list[Task]:
        return [Task(Data(prompt=f"Say {i}."), self.config.task) for i in range(2)]
"""


@pytest.mark.long
@pytest.mark.skipif(VF_EVAL is None or shutil.which("uv") is None, reason="verifiers 0.4 or uv is not installed")
def test_verifiers_plays_a_taskset_against_the_endpoint(tmp_path):
    assert VF_EVAL is not None
    folder = write_model(tmp_path)
    (tmp_path / "say_words").mkdir()
    (tmp_path / "say_words" / "taskset.py").write_text(TASKSET)
    (tmp_path / "say_words" / "__init__.py").write_text(
        "from say_words.taskset import Taskset\n\n__all__ = ['Taskset']\n"
    )

    def ask(url: str) -> str:
        command = [VF_EVAL, "say_words", "--env.agent.harness.id", "null", "--env.agent.runtime.type", "subprocess"]
        command += ["--client.base-url", f"{url}/v1", "--client.api-key-var", "HOME", "-m", "policy"]
        command += ["--no-push", "--no-rich", "-n", "2", "-r", "2"]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        env.pop("VIRTUAL_ENV", None)
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout + done.stderr

    status, told = beside(folder, ask)
    assert status == 0
    assert told.count("rollout done") == 4, told
    assert "stop=agent_completed" in told
