"""The ready-made rewards, unchanged, in two other trainers: TRL's GRPOTrainer and Tunix's GRPOLearner."""

import numpy as np
import pytest

from rewards.number import exact_number_flexible

CHARACTERS = "0123+="
PAD, BOS, EOS, FIRST = 0, 1, 2, 3
QUESTIONS = [("1+1=", "2"), ("1+2=", "3"), ("0+0=", "no number"), ("0+1=", "1")]
GROUP = 8
# What other libraries warn about while they train is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


class Probe:
    """A reward function that keeps what it was given; it adds nothing."""

    __name__ = "probe"

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completions, answer, **columns):
        self.seen.append((list(prompts), list(completions), [str(gold) for gold in answer]))
        return [0.0] * len(prompts)


def expected_means(probe):
    """Mean of each call over the rows that could be judged."""
    calls = [[r for r in exact_number_flexible(*seen) if r is not None] for seen in probe.seen]
    assert any(0.0 < np.mean(rewards) < 1.0 for rewards in calls), "a comparison of zeros says nothing"
    return [float(np.mean(rewards)) for rewards in calls]


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
    probe = Probe()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=[exact_number_flexible, probe],
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
    logged = [line["rewards/exact_number_flexible/mean"] for line in trainer.state.log_history if "reward" in line]
    np.testing.assert_allclose(logged, expected_means(probe), rtol=1e-6)


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
    probe, logged = Probe(), []

    def keep(log):
        def logging(metrics, **kwargs):
            if "rewards/exact_number_flexible" in metrics:
                logged.append(np.asarray(metrics["rewards/exact_number_flexible"][0]))
            return log(metrics, **kwargs)

        return logging

    # Which of the two Tunix calls depends on whether it knows the step.
    cluster.buffer_metrics_async = keep(cluster.buffer_metrics_async)
    cluster.buffer_metrics = keep(cluster.buffer_metrics)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(num_generations=GROUP, beta=0.0),
        reward_fns=[exact_number_flexible, probe],
    )
    prompts, answers = (np.array(column) for column in zip(*QUESTIONS, strict=True))
    learner.train({"prompts": prompts, "answer": answers} for _ in range(2))
    np.testing.assert_allclose([np.nanmean(rewards) for rewards in logged], expected_means(probe), rtol=1e-6)
    # "Cannot judge" arrives as NaN, which Tunix leaves out of its sum.
    assert all(np.isnan(rewards).sum() == GROUP for rewards in logged)
