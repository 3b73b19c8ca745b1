"""The ready-made rewards, unchanged, in two other trainers: TRL's GRPOTrainer and Tunix's GRPOLearner; and functions of
another trainer here. Some of the rewards need a column of the dataset, some have settings, some cannot judge every row,
one counts tokens.
"""

import functools
import importlib.util
import pathlib

import numpy as np
import pytest

from rewards.contract import RewardSpec, load_function
from rewards.format import format_regex
from rewards.length import length_penalty
from rewards.number import exact_number_flexible, exact_number_strict
from rewards.runner import RewardRunner
from rewards.verify import math_verified

CHARACTERS = "0123+="
PAD, BOS, EOS, FIRST = 0, 1, 2, 3
QUESTIONS = [("1+1=", "2"), ("1+2=", "3"), ("0+0=", "no number"), ("0+1=", "1")]
GROUP = 8
# What other libraries warn about while they train is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def with_settings(function, **settings):
    """A function whose settings are bound, under its own name, which both trainers log it by."""
    return functools.update_wrapper(functools.partial(function, **settings), function)


def functions(unit):
    """Ready-made rewards; the length is counted in `unit`."""
    return [
        exact_number_flexible,
        exact_number_strict,
        math_verified,
        with_settings(format_regex, pattern="[0-9]+"),
        with_settings(length_penalty, limit=2, buffer=2, unit=unit),
    ]


class Probe:
    """A reward function that keeps what it was given; it adds nothing."""

    __name__ = "probe"

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completions, answer, completion_ids=None, **columns):
        # Everything that a trainer hands over, as the other functions get it.
        ids = None if completion_ids is None else [list(row) for row in completion_ids]
        seen = {"prompts": list(prompts), "completions": list(completions), "answer": [str(gold) for gold in answer]}
        self.seen.append(seen | ({} if ids is None else {"completion_ids": ids}))
        return [0.0] * len(prompts)


def expected_means(function, probe):
    """Mean of each call over the rows that could be judged."""
    calls = [[r for r in function(**seen) if r is not None] for seen in probe.seen]
    assert any(len(set(rewards)) > 1 for rewards in calls), f"{function.__name__} gave every row the same"
    return [float(np.mean(rewards)) for rewards in calls]


@pytest.mark.slow
def test_ready_made_rewards_run_unchanged_in_trl(tmp_path):
    torch = pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    import datasets
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS} | {c: FIRST + i for i, c in enumerate(CHARACTERS)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    probe, rewards = Probe(), functions("tokens")
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=[*rewards, probe],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4 * GROUP,
            num_generations=GROUP,
            max_completion_length=2,
            max_steps=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": p, "answer": a} for p, a in QUESTIONS]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert all("completion_ids" in seen for seen in probe.seen)
    lines = [line for line in trainer.state.log_history if "reward" in line]
    for function in rewards:
        logged = [line[f"rewards/{function.__name__}/mean"] for line in lines]
        np.testing.assert_allclose(logged, expected_means(function, probe), rtol=1e-6, err_msg=function.__name__)


class CharacterTokenizer:
    """As Tunix takes one."""

    def encode(self, text, **_):
        return [FIRST + CHARACTERS.index(c) for c in text]

    def decode(self, ids, **_):
        return "".join(CHARACTERS[int(i) - FIRST] for i in ids if int(i) >= FIRST)

    def bos_id(self):
        return BOS

    def eos_id(self):
        return EOS

    def pad_id(self):
        return PAD


@pytest.mark.slow
def test_ready_made_rewards_run_unchanged_in_tunix():
    pytest.importorskip("tunix")
    import jax
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster as clusters
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    config = qwen3.ModelConfig(
        num_layers=1,
        vocab_size=FIRST + len(CHARACTERS),
        embed_dim=16,
        hidden_dim=16,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = clusters.RLCluster(
        actor=qwen3.Qwen3(config, rngs=nnx.Rngs(params=0)),
        reference=None,
        tokenizer=CharacterTokenizer(),
        cluster_config=clusters.ClusterConfig(
            role_to_mesh=dict.fromkeys((clusters.Role.ACTOR, clusters.Role.REFERENCE, clusters.Role.ROLLOUT), mesh),
            rollout_engine="vanilla",
            training_config=clusters.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-3), eval_every_n_steps=1000, max_steps=1000
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=2, max_prompt_length=8, kv_cache_size=16, temperature=1.0
            ),
        ),
    )
    probe, rewards = Probe(), functions("characters")
    logged = {function.__name__: [] for function in rewards}

    def keep(log):
        def logging(metrics, **kwargs):
            for name, values in logged.items():
                if f"rewards/{name}" in metrics:
                    values.append(np.asarray(metrics[f"rewards/{name}"][0]))
            return log(metrics, **kwargs)

        return logging

    # Which of the two Tunix calls depends on whether it knows the step.
    cluster.buffer_metrics_async = keep(cluster.buffer_metrics_async)
    cluster.buffer_metrics = keep(cluster.buffer_metrics)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(num_generations=GROUP, beta=0.0),
        reward_fns=[*rewards, probe],
    )
    prompts, answers = (np.array(column) for column in zip(*QUESTIONS, strict=True))
    learner.train({"prompts": prompts, "answer": answers} for _ in range(2))
    for function in rewards:
        means = [np.nanmean(values) for values in logged[function.__name__]]
        np.testing.assert_allclose(means, expected_means(function, probe), rtol=1e-6, err_msg=function.__name__)
    # "Cannot judge" arrives as NaN, which Tunix leaves out of its sum.
    for name, num_unjudged in (("exact_number_flexible", GROUP), ("exact_number_strict", GROUP), ("format_regex", 0)):
        assert all(np.isnan(values).sum() == num_unjudged for values in logged[name]), name


def test_functions_of_verl_run_unchanged():
    """verl's own, by their files: importing verl imports torch, which they do without."""
    verl = importlib.util.find_spec("verl")
    if verl is None or verl.origin is None:
        pytest.skip("verl is not installed")
    folder = pathlib.Path(verl.origin).parent / "utils" / "reward_score"
    completions, answers = ["so #### 4", "Answer: 4", "Answer: 5", "no"], ["4"] * 4
    specs = [RewardSpec(name, f"{folder}/{name}.py:compute_score", 1.0, {}) for name in ("gsm8k", "math_dapo")]
    with RewardRunner(specs, ["answer"], 1, 10.0) as runner:
        result = runner.score(["2+2="] * 4, completions, {"answer": answers})
    expected = [load_function(spec) for spec in specs]
    given = [{"solution_str": text, "ground_truth": "4"} for text in completions]
    dicts = [expected[1](**arguments) for arguments in given]
    assert result.rewards == [
        [expected[0](**arguments), judged["score"]] for arguments, judged in zip(given, dicts, strict=True)
    ]
    assert {row[0] for row in result.rewards} == {0.0, 1.0}
    assert {row[1] for row in result.rewards} == {-1.0, 1.0}
    assert [row["math_dapo"] for row in result.logged] == dicts
    assert result.sums == {"math_dapo": {"score": [-2.0, 4], "acc": [1.0, 4]}}


SEVERAL = """
import asyncio


def helper(text):
    return text.strip().split()[-1]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if helper(solution_str) != ground_truth:
        return {"score": 0.0, "acc": False, "pred": helper(solution_str), "turns": extra_info["num_turns"]}
    return {"score": 1.0 + extra_info["index"], "acc": True, "pred": ground_truth, "turns": extra_info["num_turns"]}


async def later(data_source, solution_str, ground_truth, extra_info, bonus=0.0):
    await asyncio.sleep(0)
    return (helper(solution_str) == ground_truth) * 1.0 + bonus


def by_any_name(solution_str, **kwargs):
    return float(kwargs["data_source"] == "mine" and kwargs["ground_truth"] in solution_str)
"""


def test_functions_of_one_file_as_verl_calls_them(tmp_path):
    """`custom_reward_function` with its path, name and reward_kwargs; the columns are those of verl's parquet files."""
    (tmp_path / "scores.py").write_text(SEVERAL)
    given = {"compute_score": {}, "later": {"bonus": 0.5}, "by_any_name": {}}
    specs = [RewardSpec(name, f"{tmp_path}/scores.py:{name}", 1.0, kwargs) for name, kwargs in given.items()]
    columns = {
        "data_source": ["mine"] * 2,
        "reward_model": [{"style": "rule", "ground_truth": "4"}] * 2,
        "extra_info": [{"index": 3}, {"index": 4}],
        "ability": ["math"] * 2,
    }
    prompts = [[{"role": "user", "content": "2+2"}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("It is 4", "5")]
    with RewardRunner(specs, list(columns), 2, 10.0) as runner:
        result = runner.score(prompts, completions, columns)
    assert not result.problems
    assert result.rewards == [[4.0, 1.5, 1.0], [0.0, 0.5, 0.0]]
    assert result.logged[1]["compute_score"] == {"score": 0.0, "acc": False, "pred": "5", "turns": 2}
    assert result.sums["compute_score"] == {"score": [4.0, 2], "acc": [1.0, 2], "turns": [4.0, 2]}
