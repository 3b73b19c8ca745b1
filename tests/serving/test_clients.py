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


GREEDY_TASK = """\
task: greedy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["<never>"], do_sample: false, temperature: 0.0, max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
EXACT = """\
def exact(prompts, completions, answer):
    return [float(completion == right) for completion, right in zip(completions, answer)]
"""


@pytest.mark.long
@pytest.mark.skipif(LM_EVAL is None, reason="lm-eval is not installed: pip install 'lm-eval[api]' transformers")
def test_lm_eval_and_grpo_eval_have_the_same_greedy_number_on_the_same_prompts(tmp_path, capfd):
    """Two thirds of the answers are what the model says, by `grpo eval` itself."""
    assert LM_EVAL is not None
    folder, data, output = write_model(tmp_path), tmp_path / "rows.jsonl", tmp_path / "own.jsonl"
    (tmp_path / "exact.py").write_text(EXACT)
    (tmp_path / "greedy.yaml").write_text(GREEDY_TASK.format(data=data))
    rows = [{"prompt": f"{i} and {i * i} are", "answer": "no"} for i in range(12)]
    # Bytes that are letters: what is no text would be compared as replacement characters.
    letters = f"sampling.logit_bias={{{', '.join(f'{3 + ord(letter)}: 1000' for letter in 'abcdefgh')}}}"
    recipe = [f"eval.sets={{own: {{source: {data}}}}}", f"rewards.functions=['{tmp_path / 'exact.py'}:exact']", letters]
    recipe += ["sampling.max_completion_length=6", "sampling.slots=2", "mesh.num_devices=1"]

    def own_number() -> float:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["eval", str(folder), *recipe, "--output", str(output)]) in (0, None)
        records = [json.loads(line) for line in output.read_text().splitlines()]
        for place, record in enumerate(records):
            rows[place]["answer"] = record["completion"] if place % 3 else "no"
        return sum(record["rewards"][f"{tmp_path / 'exact.py'}:exact"] for record in records) / len(rows)

    assert own_number() == 0
    wanted = own_number()
    assert wanted == 8 / 12

    def ask(url: str) -> Any:
        arguments = f"model=policy,base_url={url}/v1/completions,tokenizer={folder},num_concurrent=2,add_bos_token=True"
        command = [LM_EVAL, "--model", "local-completions", "--tasks", "greedy", "--include_path", str(tmp_path)]
        command += ["--model_args", arguments, "--log_samples", "--output_path", str(tmp_path / "out")]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            env.pop(name, None)
        subprocess.run(command, check=True, env=env, cwd=tmp_path)

    status, _ = beside(folder, ask, letters)
    assert status == 0
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["greedy"]["exact_match,none"] == pytest.approx(wanted)
    (samples,) = (tmp_path / "out").rglob("samples_greedy_*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    own = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
    assert [sample["resps"][0][0] for sample in found] == own
    capfd.readouterr()


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
