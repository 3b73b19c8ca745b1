"""Reward models: the scores are those of transformers, and a run with one trains, evaluates and knows it again."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.grpo_trainer import train
from rl.models.files.reward_model import read_reward_config
from rl.rollout.reward_model import RewardModel, open_reward_models
from rl.run.metrics import read_metrics, read_samples
from rl.run_folder.trust import code_of
from rl.sampler.contract import PREFILL
from rl.state.origin import reward_model_identity
from rl.tools.programs.compile_report import CompileReport
from rl.tools.programs.loop_programs import loop_programs
from rl.training.train_step import TRAIN_STEP
from tests.helpers.reward_model_golden import ARCHITECTURES, EXPECTED, SEQUENCES, write_folder

RECIPE = """
model:
  arch:
    {family: qwen3, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}
data: {source: arithmetic, args: {operation: add, digits: 1}, max_prompt_length: 40, eval_size: 2, chat: true}
sampling: {max_completion_length: 6}
grpo: {steps: 1, prompts_per_step: 2, group_size: 2, max_tokens_per_microbatch: 256}
mesh: {num_devices: 2}
"""


def recipe(tmp_path, source, *overrides):
    (tmp_path / "recipe.yml").write_text(RECIPE)
    functions = json.dumps([{"function": f"model:{source}", "name": "judge"}])
    settings = (f"output_dir={tmp_path / 'run'}", f"rewards.functions={functions}", *overrides)
    return load_config(tmp_path / "recipe.yml", settings)


def model_of(tmp_path, source, *overrides):
    config = recipe(tmp_path, source, *overrides)
    return open_reward_models(config, create_mesh(config.mesh))["judge"]


@pytest.mark.matrix
@pytest.mark.parametrize("pure_nnx", ["false", "true"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_transformers(tmp_path, name, pure_nnx):
    expected = json.loads(EXPECTED.read_text())["scores"][name]
    settings = ("mesh={num_devices: 4, fsdp: 2, tensor: 2}", "rewards.model_tokens=128", f"pure_nnx={pure_nnx}")
    scores = model_of(tmp_path, write_folder(name, tmp_path / name), *settings).scores(SEQUENCES)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 1  # they differ, so that a mix-up of sequences shows


def test_without_a_padding_token_the_last_token_counts(tmp_path):
    model = model_of(tmp_path, write_folder("qwen3", tmp_path / "qwen3", pad_token_id=None))
    with_pad, without = model.scores([[7, 30, 12, 0, 0], [7, 30, 12]])
    assert with_pad != without


def test_text_is_tokenised_by_the_reward_models_own_tokenizer_and_template(tmp_path):
    from transformers import AutoTokenizer

    folder = write_folder("qwen3", tmp_path / "qwen3")
    model, theirs = model_of(tmp_path, folder), AutoTokenizer.from_pretrained(folder)
    assert model.token_ids("1+1=", " 2") == theirs.encode("1+1= 2")
    asked = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    answered = [{"role": "assistant", "content": "2"}]
    text = theirs.apply_chat_template([*asked, *answered], tokenize=False)
    assert text == "<eos>system Add.<eos>user 1+1=<eos>assistant 2"
    assert model.token_ids(asked, answered) == theirs.encode(text, add_special_tokens=False)
    # A completion beyond the positions fails alone.
    short, long = model(["1+1="] * 2, ["2", "2" * 600])
    assert short == model.scores([theirs.encode("1+1=2")])[0]
    assert long == ("exception", "the reward model takes 1 to 512 tokens (its positions), got 605")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, r"config.json: .* must have one label, .* got 2"),
        ({"id2label": None}, r"must have one label, .* got 2 .*num_labels=1"),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"architectures must be \['Qwen3ForSequenceClassification'\] .* got"),
        ({"model_type": "bert"}, r"model_type must be one of llama, .* got 'bert'"),
        ({"hidden_size": 48}, r"must have shape"),
        ({"vocab_size": 50}, r"must have shape"),
    ],
)
def test_what_is_no_reward_model_is_refused(tmp_path, changes, message):
    folder = write_folder("qwen3", tmp_path / "qwen3", **changes)
    with pytest.raises(ValueError, match=message):
        read_reward_config(folder)


def test_an_entry_with_settings_of_a_function_is_refused_and_a_model_is_no_code_to_trust(tmp_path):
    for fields in ({"kwargs": {"scale": 2}}, {"elementwise": True}, {"needs_group": True}):
        functions = json.dumps([{"function": "model:judge", "name": "judge", **fields}])
        with pytest.raises(
            ValueError, match=r"rewards.functions: 'judge' must have neither kwargs nor elementwise nor"
        ):
            recipe(tmp_path, "judge", f"rewards.functions={functions}")
    with pytest.raises(ValueError, match=r"'model:' must name a folder or a hub id behind model:, got nothing"):
        recipe(tmp_path, "judge", "rewards.functions=['model:']")
    assert code_of(recipe(tmp_path, "judge")) == []


def test_a_folder_without_a_head_or_for_a_larger_tokenizer_is_refused_by_name(tmp_path):
    folder = write_folder("qwen3", tmp_path / "qwen3")
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    score = tensors.pop("score.weight")
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"reward 'judge': .*the tensor score.weight is missing"):
        model_of(tmp_path, folder)
    safetensors.numpy.save_file({**tensors, "score.weight": np.concatenate([score, score])}, path)
    with pytest.raises(ValueError, match=r"score.weight must have shape \(1, 32\), got \(2, 32\)"):
        model_of(tmp_path, folder)
    with pytest.raises(ValueError, match=r"reward 'judge': the model must be a Hugging Face folder or a hub id"):
        model_of(tmp_path, tmp_path / "nowhere")


def test_a_run_is_rewarded_and_evaluated_by_a_reward_model_and_resumes_with_no_other(tmp_path):
    folder = write_folder("qwen3", tmp_path / "qwen3")
    config = recipe(tmp_path, folder)
    run = train(config)
    model = RewardModel(config, str(folder), create_mesh(config.mesh))
    for sample in read_samples(run):
        answer = [{"role": "assistant", "content": sample["completion"]}]
        wanted = model([sample["prompt"]], [answer])[0]
        assert sample["rewards"]["judge"] == pytest.approx(wanted, abs=1e-5)
    first, last = [line["eval/reward/judge/mean"] for line in read_metrics(run) if "eval/reward/judge/mean" in line]
    assert np.isfinite([first, last]).all()
    identity = json.loads((run / "run.json").read_text())["reward_models"]["judge"]
    assert identity.keys() == {"source", "hash", "tokenizer"}
    shutil.rmtree(folder)
    write_folder("qwen2", folder)
    with pytest.raises(ValueError, match="reward_models"):
        train(recipe(tmp_path, folder, "grpo.steps=2"))


def test_grpo_rewards_check_scores_with_a_reward_model(tmp_path):
    from rl.tools.rewards import check

    config = recipe(tmp_path, write_folder("qwen3", tmp_path / "qwen3"))
    functions = f"rewards.functions=[{config.rewards.functions[0].function}]"
    sorts = check(tmp_path / "recipe.yml", 1, overrides=[functions, "mesh.fsdp=4", "mesh.num_devices=4"]).sorts
    assert len({judged.total for judged in sorts.values()}) > 3


@pytest.mark.long
def test_grpo_eval_scores_with_a_reward_model(tmp_path):
    from rl.tools.evaluate import evaluate_source

    run = train(recipe(tmp_path, write_folder("qwen3", tmp_path / "qwen3")))
    last = read_metrics(run)[-1]["eval/reward/judge/mean"]
    assert evaluate_source(run)[0].means["judge"] == pytest.approx(last, abs=1e-5)


def test_its_weights_are_counted_in_the_memory_of_a_device(tmp_path):
    folder = write_folder("qwen3", tmp_path / "qwen3")
    config = recipe(tmp_path, folder, "mesh.num_devices=1")
    without = load_config(tmp_path / "recipe.yml", ["mesh.num_devices=1"])
    devices = jax.devices()[:1]
    loop, bare = loop_programs(config, devices, 1 << 30), loop_programs(without, devices, 1 << 30)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    weights = sum(tensor.nbytes for name, tensor in stored.items() if name != "score.weight")
    assert loop.resident.reward_models == weights
    assert bare.resident.reward_models == 0
    held = {program.name: program.held for program in bare.programs}
    more = {program.name: program.held - held[program.name] for program in loop.programs}
    assert more[TRAIN_STEP] == more[PREFILL] == weights
    assert CompileReport(loop, None, []).kv_budget() == CompileReport(bare, None, []).kv_budget() - weights
    with pytest.raises(ValueError, match=rf"reward models .* take {weights:,} of its {weights:,} bytes; .*mesh.fsdp"):
        loop_programs(config, devices, weights)
    # The share for keys and values is one of what the reward model leaves.
    loop_programs(without, devices, weights + 100)
    with pytest.raises(ValueError, match=r"sampling\.kv_memory must allow at least one completion"):
        loop_programs(config, devices, weights + 100)
    identity = reward_model_identity(config, {"judge": model_of(tmp_path, folder).tokenizer})
    assert identity == reward_model_identity(config)
