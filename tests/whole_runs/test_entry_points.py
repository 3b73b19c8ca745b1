"""Every command that needs a state takes it from `init_state_fn`, from one recipe and one run; those that decode or
export build it without an optimizer, those that work on files build none.

No command asks for the flavour, so each is walked in one of the two, and all in both where it is long.
"""

import ast
import json
import pathlib

import pytest
import yaml

from rl.cli import COMMANDS, main
from rl.config.load import load_config
from rl.models.foreign.own_files import save_weights
from rl.serving import server
from rl.state.states import InitStateFn
from rl.tools.checkpoints import checkpoint, lora
from rl.tools.trained import load_start
from tests.helpers.places import REWARDS, ROOT

FLAVOURS = {"linen": False, "nnx": True}
RECIPE = """
output_dir: {folder}/run
seed: 3
pure_nnx: {pure_nnx}
tokenizer: {{source: byte}}
model:
  arch:
    {{family: qwen3, hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data:
  {{source: "{folder}/rows.jsonl", columns: {{prompt: question, answer: answer}}, eval_size: 2, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{rewards}:digit_share", name: digits}}]}}
sampling: {{max_completion_length: 4, slots: 2}}
grpo: {{steps: 1, prompts_per_step: 2, group_size: 2, max_tokens_per_microbatch: 64}}
sft: {{steps: 1, batch_size: 2, completion_column: answer}}
lora: {{rank: {rank}}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
"""
# What is walked in which flavour. `train` and `export` make what the others take, and `quantize` reads a module of
# one's own, which has a flavour; adapters are walked beside `lora`.
WALKED = {
    "linen": {"train", "sft", "export", "checkpoint", "quantize", "compile", "doctor"},
    "nnx": {"train", "eval", "sample", "serve", "export", "lora", "quantize"},
}
# `launch` starts others, `report` reads metrics, `data` prompts, `rewards` runs functions; what works on files,
# `quantize` of a folder layer by layer, is walked as well, and holds no state.
NOT_WALKED = {"data", "launch", "report", "rewards"}
ON_FILES = {("quantize", "folder"), ("checkpoint", "inspect"), ("checkpoint", "convert")}
# Parameters only, of whole weights and of adapters beside their base.
NO_OPTIMIZER = {
    ("eval",),
    ("sample",),
    ("serve",),
    ("export",),
    ("quantize", "own_config.yml"),
    *(("lora", name) for name in ("extract", "merge", "unmerge", "inspect")),
}


@pytest.mark.parametrize(
    ("flavour", "walked"),
    [
        *(pytest.param(flavour, commands, id=flavour) for flavour, commands in WALKED.items()),
        *(pytest.param(flavour, set(COMMANDS), marks=pytest.mark.long, id=f"{flavour}-all") for flavour in FLAVOURS),
    ],
)
def test_every_command_takes_its_state_from_init_state_fn(flavour, walked, tmp_path, monkeypatch, capsys):
    is_nnx = str(FLAVOURS[flavour]).lower()
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
    recipes = {}
    for name, rank in (("whole", 0), ("adapters", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipes[name] = tmp_path / name / "recipe.yml"
        recipes[name].write_text(
            RECIPE.format(
                folder=tmp_path / name,
                pure_nnx=is_nnx,
                rewards=REWARDS,
                rank=rank,
            )
        )
    own_module, own_weights = tmp_path / "own_config.yml", tmp_path / "own_config.safetensors"
    source = f"{ROOT}/examples/own_model/{'gpt' if FLAVOURS[flavour] else 'ssm'}.py:build"
    model = {"source": source, "args": {"hidden_size": 16, "num_layers": 1}}
    own_module.write_text(yaml.safe_dump({"pure_nnx": FLAVOURS[flavour], "model": model, "mesh": {"num_devices": 1}}))
    save_weights(own_weights, load_start(load_config(own_module, ())).params)
    built: list[tuple[str, bool]] = []
    call = InitStateFn.__call__

    def recorded(self: InitStateFn):
        built.append((self.policy.flavour, self.optimizer is not None))
        return call(self)

    monkeypatch.setattr(InitStateFn, "__call__", recorded)

    def stopped_at_once(app, engine, *others):
        assert engine.is_running
        engine.close()
        return engine.drain(0.0)

    monkeypatch.setattr(server, "serve", stopped_at_once)
    whole, adapters = recipes["whole"], recipes["adapters"]
    run, tuned = whole.parent / "run", adapters.parent / "run"
    beside = tmp_path / "beside.yml"
    beside.write_text(
        yaml.safe_dump(yaml.safe_load(adapters.read_text()) | {"model": {"source": f"{tmp_path}/folder"}})
    )
    walk = {
        "train": [[whole], [adapters]],
        "sft": [[whole, f"output_dir={tmp_path / 'sft'}"]],
        "eval": [[run], [whole], [tuned]],
        "sample": [
            *([model, "--prompt", "1+1="] for model in (run, whole, tuned)),
            ["--replay", run, 1, 0, 0],
        ],
        "serve": [[run, "--port", 0, "--parked", 0, "sampling.slots=2"]],
        "export": [
            [run, tmp_path / "folder"],
            [run, tmp_path / "params", "--format", "params"],
            [tuned, tmp_path / "adapter", "--adapter"],
        ],
        "lora": [
            ["merge", tmp_path / "folder", tmp_path / "adapter", tmp_path / "merged", f"pure_nnx={is_nnx}"],
            ["unmerge", tmp_path / "merged", tmp_path / "adapter", tmp_path / "unmerged", f"pure_nnx={is_nnx}"],
            ["extract", tuned, tmp_path / "extracted"],
            ["inspect", tuned],
            ["convert", tmp_path / "adapter", tmp_path / "back", beside],
        ],
        "checkpoint": [
            ["verify", run],
            ["bench", whole, "--steps", 1],
            ["inspect", run],
            ["convert", run, tmp_path / "converted"],
        ],
        "quantize": [
            [tmp_path / "folder", tmp_path / "quantized"],
            [own_module, tmp_path / "quantized_own", "--text", own_module, f"model.weights={own_weights}"],
        ],
        "compile": [[whole, "--devices", "cpu:1", "--json", tmp_path / "report.json"]],
        "doctor": [[whole]],
    }
    assert {*walk, *NOT_WALKED} == set(COMMANDS)
    assert set(walk) == set().union(*WALKED.values())
    assert {name for name, *_ in walk["lora"]} == set(lora._SUBCOMMANDS)
    assert {name for name, *_ in walk["checkpoint"]} == set(checkpoint._COMMANDS)
    for command, calls in walk.items():
        for arguments in calls if command in walked else ():
            if "lora" not in walked and {adapters, tuned} & set(arguments):
                continue
            built.clear()
            status = main([command, *map(str, arguments)])
            said = capsys.readouterr()
            assert status in (0, None), (command, arguments, said.err)
            names = {(command,), (command, pathlib.Path(arguments[0]).name)}
            if names & ON_FILES:
                assert not built, f"grpo {command} {arguments} built a state"
                continue
            assert built, f"grpo {command} {arguments} built no state through init_state_fn"
            assert {name for name, _ in built} == {flavour}, (command, arguments)
            if names & NO_OPTIMIZER:
                assert not any(has_optimizer for _, has_optimizer in built), (command, arguments)
    if "compile" in walked:
        assert json.loads((tmp_path / "report.json").read_text())["fits"]


def test_nothing_else_draws_the_weights_of_a_policy():
    """`policy.init` is called by `init_state_fn` alone; the wave sampler asks for its shapes."""
    callers = set()
    for path in (ROOT / "rl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "init":
                owner = ast.unparse(node.func.value)
                if owner.endswith("policy"):
                    callers.add(path.relative_to(ROOT).as_posix())
    assert callers == {"rl/state/states.py", "rl/sampler/wave_sampler.py"}
    assert "jax.eval_shape(lambda: self._policy.init(" in (ROOT / "rl/sampler/wave_sampler.py").read_text()
