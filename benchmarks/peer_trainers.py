"""Tunix' and TRL's own trainers, stepped: their loops, losses and optimizer updates, untouched.

Only what stands for the rollout is replaced where a batch brings its completions along. Both run in float32, without
micro-batches and without packing: the whole batch is one padded array, which is their fastest way on this size.
"""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from reward import even_share
from shapes import Workload
from stepped import SteppedLoop
from trainers import BETA, LEARNING_RATE, MAX_GRAD_NORM, PAD_ID, Batch, Outcome, number_tokenizer, text_of
from weights import TokenIds, tunix_model

from rl.models.config import ModelConfig


class TunixTrainer:
    """`tunix.rl.grpo.grpo_learner.GRPOLearner` with the vanilla rollout, actor, rollout and reference on one device."""

    name = "tunix"

    def __init__(
        self,
        config: ModelConfig,
        folder: pathlib.Path,
        reference: pathlib.Path,
        workload: Workload,
        batches: Sequence[Batch],
    ) -> None:
        from tunix.rl.rollout import base_rollout

        self._batches, self._workload = batches, workload
        self._batch = batches[0]
        self._num_tokens = 0
        self._eos_ids = workload.eos_ids(config.vocab_size)
        self._output_class = base_rollout.RolloutOutput
        # A mesh with the names that Tunix' default shardings use.
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
        length = workload.prompt_lengths[1]
        rollout = base_rollout.RolloutConfig(
            max_tokens_to_generate=workload.cap,
            max_prompt_length=length,
            kv_cache_size=length + workload.cap,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=list(self._eos_ids) or [config.vocab_size + 1],
        )
        self._learner = tunix_learner(
            actor=tunix_model(config, folder, mesh),
            reference=tunix_model(config, reference, mesh),
            tokenizer=Numbers(config.vocab_size),
            mesh=mesh,
            rollout_config=rollout,
            num_generations=workload.num_samples,
            reward_fn=self._reward,
        )
        worker = self._learner.rl_cluster.rollout
        self._generate = worker.generate
        worker.generate = self._rollout
        self._trainer: Any = self._learner.rl_cluster.actor_trainer
        self._loop = SteppedLoop(lambda pause: self._learner.train(self._dataset(pause)))

    def step(self) -> Outcome:
        self._loop.step()
        # Tunix writes its metrics a step late; this is where those of the last step wait.
        metrics = self._trainer._prev_buffered_train_metrics
        return Outcome(self._num_tokens, float(metrics.loss), float(metrics.additional_metrics["grad_norm"][0][-1]))

    def close(self) -> None:
        self._loop.close()

    def _dataset(self, pause: Callable[[], None]) -> Iterator[dict[str, np.ndarray]]:
        for batch in self._batches:
            pause()
            self._batch = batch
            yield {"prompts": np.array([text_of(prompt) for prompt in batch.prompts])}
        pause()

    def _rollout(self, prompts: Sequence[str], rollout_config: Any, **options: Any) -> Any:
        if self._batch.completions is None:
            # Tunix' own default is the same key for every call.
            rollout_config.seed = jax.random.PRNGKey(self._trainer.train_steps)
            output = self._generate(prompts, rollout_config, **options)
            # The EOS is cut off; only the number of tokens matters here.
            self._num_tokens = sum(min(len(ids) + 1, self._workload.cap) for ids in output.tokens)
            return output
        self._num_tokens = sum(map(len, self._batch.completions))
        length = self._workload.prompt_lengths[1]
        rows = [self._batch.prompts[i // self._workload.num_samples] for i in range(self._workload.num_rows)]
        return self._output_class(
            text=[""] * len(rows),
            logits=None,
            tokens=[np.array(ids) for ids in self._batch.completions],
            left_padded_prompt_tokens=np.array([[PAD_ID] * (length - len(row)) + row for row in rows]),
            logprobs=None,
        )

    def _reward(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return even_share(prompts, completions) if self._batch.rewards is None else self._batch.rewards


class Numbers(TokenIds):
    """Token ids as text; Tunix embeds its padding, so that must be in the vocabulary."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return text_of(ids)

    def pad_id(self) -> int:
        return PAD_ID


def tunix_learner(
    *,
    actor: Any,
    reference: Any,
    tokenizer: Any,
    mesh: jax.sharding.Mesh,
    rollout_config: Any,
    num_generations: int,
    reward_fn: Callable,
) -> Any:
    """Tunix' GRPO with the common loss and optimizer."""
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner

    roles = rl_cluster.Role
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=tunix_optimizer(),
        eval_every_n_steps=10**9,
        max_steps=10**9,  # the data set ends the run
        pbar_description=None,
    )
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={roles.ACTOR: mesh, roles.REFERENCE: mesh, roles.ROLLOUT: mesh},
            rollout_engine="vanilla",
            training_config=training,
            rollout_config=rollout_config,
        ),
    )
    algorithm = grpo_learner.GRPOConfig(num_generations=num_generations, beta=BETA, kl_loss_mode="low_var_kl")
    return grpo_learner.GRPOLearner(rl_cluster=cluster, algo_config=algorithm, reward_fns=reward_fn)


def tunix_optimizer() -> optax.GradientTransformation:
    """AdamW behind clipping, as everybody here."""
    return optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0))


class TRLTrainer:
    """`trl.GRPOTrainer` with generation by transformers, on the CPU."""

    name = "trl"

    def __init__(
        self,
        config: ModelConfig,
        folder: pathlib.Path,
        reference: pathlib.Path,
        workload: Workload,
        batches: Sequence[Batch],
    ) -> None:
        import datasets
        import torch
        import transformers
        import trl

        transformers.utils.logging.disable_progress_bar()
        self._batches = iter(batches)
        self._batch = batches[0]
        self._num_tokens, self._loss = 0, 0.0
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = list(workload.eos_ids(config.vocab_size)) or None
        # One batch more than there is: the loop fetches the next one before it stands still.
        prompts = [text_of(prompt) for batch in (*batches, batches[-1]) for prompt in batch.prompts]
        arguments = trl.GRPOConfig(
            output_dir=str(folder.parent / "trl"),
            per_device_train_batch_size=workload.num_rows,
            num_generations=workload.num_samples,
            max_completion_length=workload.cap,
            max_steps=len(batches) + 1,
            shuffle_dataset=False,
            beta=BETA,
            use_bias_correction_kl=False,
            loss_type="grpo",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            weight_decay=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        self._trainer: Any = trl.GRPOTrainer(
            model=model,
            reward_funcs=self._reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=number_tokenizer(config.vocab_size),
        )
        self._trainer.remove_callback(transformers.PrinterCallback)
        other: Any = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
        self._trainer.ref_model.load_state_dict(other.state_dict())
        self._generate = self._trainer._generate_single_turn
        self._trainer._generate_single_turn = self._rollout
        self._training_step = self._trainer.training_step
        self._trainer.training_step = self._update
        self._loop = SteppedLoop(self._run)

    def step(self) -> Outcome:
        self._batch = next(self._batches)
        self._loop.step()
        logged = [entry["grad_norm"] for entry in self._trainer.state.log_history if "grad_norm" in entry]
        return Outcome(self._num_tokens, self._loss, float(logged[-1]))

    def close(self) -> None:
        self._loop.close()

    def _run(self, pause: Callable[[], None]) -> None:
        import transformers

        class Pause(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                pause()

        self._trainer.add_callback(Pause())
        self._trainer.train()

    def _rollout(self, *inputs: Any, **options: Any) -> tuple[list[list[int]], None]:
        completions = self._batch.completions
        if completions is None:
            completions, _ = self._generate(*inputs, **options)
        self._num_tokens = sum(map(len, completions))
        return completions, None

    def _update(self, *inputs: Any) -> Any:
        loss = self._training_step(*inputs)
        self._loss = float(loss)
        return loss

    def _reward(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return even_share(prompts, completions) if self._batch.rewards is None else self._batch.rewards


PEER_TRAINERS = {"tunix": TunixTrainer, "trl": TRLTrainer}
