"""Keys of TRL, verl, MaxText and Tunix, and what is said here in their place.

In: nothing. Out: `PEER_KEYS`, of which the messages about unknown keys and the pages "coming from" are made. Where a
peer's key means the same under the same name (`temperature`, `beta`), the row still says in which section it is here.
"""

from typing import NamedTuple


class PeerKey(NamedTuple):
    """One row.

    Attributes:
      peer: TRL, verl, MaxText or Tunix.
      key: as it is there, with dots where it is in a section.
      ours: the dotted key here; several with commas between; empty where nothing has to be said.
      note: what differs; a unit, a value, or why there is no such key. May be empty.
    """

    peer: str
    key: str
    ours: str
    note: str = ""


_OWN_SAMPLER = "the sampler is a part of the trainer and shares its weights: leave it out"
_LEAST_LETTERS = 5  # of the last part of a key by which it is recognised
_OVER_ALL = "prompts of a step over all devices; completions are that times grpo.group_size"

PEER_KEYS: tuple[PeerKey, ...] = (
    # TRL: GRPOConfig, TrainingArguments, ModelConfig, ScriptArguments
    PeerKey("TRL", "model_name_or_path", "model.source"),
    PeerKey("TRL", "dtype", "model.dtype", "weights keep model.param_dtype"),
    PeerKey("TRL", "bf16", "model.dtype", "bfloat16"),
    PeerKey("TRL", "attn_implementation", "model.attention"),
    PeerKey("TRL", "gradient_checkpointing", "model.remat", "block"),
    PeerKey("TRL", "dataset_name", "data.source"),
    PeerKey("TRL", "dataset_config", "data.args", "{name: ...}"),
    PeerKey("TRL", "dataset_train_split", "data.args", "{split: ...}"),
    PeerKey("TRL", "dataset_test_split", "data.eval_args", "{split: ...}, with data.eval_source"),
    PeerKey("TRL", "max_prompt_length", "data.max_prompt_length", "longer prompts are dropped, never cut"),
    PeerKey("TRL", "max_completion_length", "sampling.max_completion_length"),
    PeerKey("TRL", "chat_template_kwargs", "data.chat_template_kwargs"),
    PeerKey("TRL", "num_generations", "grpo.group_size", "completions of a prompt"),
    PeerKey("TRL", "per_device_train_batch_size", "grpo.prompts_per_step", _OVER_ALL),
    PeerKey("TRL", "generation_batch_size", "grpo.prompts_per_step", _OVER_ALL),
    PeerKey("TRL", "gradient_accumulation_steps", "grpo.max_tokens_per_microbatch", "bounds memory, not the result"),
    PeerKey("TRL", "steps_per_generation", "grpo.minibatches", "updates of a pass over a rollout"),
    PeerKey("TRL", "num_iterations", "grpo.epochs", "passes over a rollout"),
    PeerKey("TRL", "max_steps", "grpo.steps", "rollouts; there is no num_train_epochs"),
    PeerKey("TRL", "num_train_epochs", "grpo.steps", "rows / grpo.prompts_per_step is one epoch"),
    PeerKey("TRL", "learning_rate", "optimizer.lr"),
    PeerKey("TRL", "lr_scheduler_type", "optimizer.schedule"),
    PeerKey("TRL", "warmup_steps", "optimizer.warmup_updates"),
    PeerKey("TRL", "warmup_ratio", "optimizer.warmup_updates", "a number of updates"),
    PeerKey("TRL", "weight_decay", "optimizer.weight_decay"),
    PeerKey("TRL", "adam_beta1", "optimizer.b1"),
    PeerKey("TRL", "adam_beta2", "optimizer.b2"),
    PeerKey("TRL", "adam_epsilon", "optimizer.eps"),
    PeerKey("TRL", "max_grad_norm", "optimizer.max_grad_norm"),
    PeerKey("TRL", "optim", "optimizer.name"),
    PeerKey("TRL", "beta", "grpo.beta"),
    PeerKey("TRL", "epsilon", "grpo.epsilon"),
    PeerKey("TRL", "epsilon_high", "grpo.epsilon_high"),
    PeerKey("TRL", "delta", "grpo.delta"),
    PeerKey("TRL", "loss_type", "grpo.loss_type"),
    PeerKey("TRL", "importance_sampling_level", "grpo.importance_sampling_level"),
    PeerKey("TRL", "scale_rewards", "grpo.scale_rewards", "group, batch or none"),
    PeerKey("TRL", "multi_objective_aggregation", "grpo.aggregation"),
    PeerKey("TRL", "reward_weights", "rewards.functions", "weight of each entry"),
    PeerKey("TRL", "reward_funcs", "rewards.functions", "a list of {function: path/to/file.py:name}"),
    PeerKey("TRL", "mask_truncated_completions", "grpo.mask_truncated"),
    PeerKey("TRL", "top_entropy_quantile", "grpo.top_entropy_quantile"),
    PeerKey("TRL", "use_bias_correction_kl", "grpo.use_bias_correction_kl"),
    PeerKey("TRL", "off_policy_mask_threshold", "grpo.off_policy_mask_threshold"),
    PeerKey("TRL", "sync_ref_model", "reference.sync_every", "0: never"),
    PeerKey("TRL", "ref_model_sync_steps", "reference.sync_every"),
    PeerKey("TRL", "ref_model_mixup_alpha", "reference.ema", "share of the policy"),
    PeerKey("TRL", "temperature", "sampling.temperature"),
    PeerKey("TRL", "top_p", "sampling.top_p"),
    PeerKey("TRL", "top_k", "sampling.top_k"),
    PeerKey("TRL", "min_p", "sampling.min_p"),
    PeerKey("TRL", "repetition_penalty", "sampling.repetition_penalty"),
    PeerKey("TRL", "use_vllm", "", _OWN_SAMPLER),
    PeerKey("TRL", "vllm_mode", "", _OWN_SAMPLER),
    PeerKey("TRL", "vllm_gpu_memory_utilization", "sampling.kv_memory", "share of a device for keys and values"),
    PeerKey("TRL", "vllm_importance_sampling_correction", "grpo.sampler_is_correction"),
    PeerKey("TRL", "vllm_importance_sampling_mode", "grpo.sampler_is_mode"),
    PeerKey("TRL", "vllm_importance_sampling_cap", "grpo.sampler_is_clip_max"),
    PeerKey("TRL", "use_peft", "lora.rank", "above 0"),
    PeerKey("TRL", "lora_r", "lora.rank"),
    PeerKey("TRL", "lora_alpha", "lora.alpha"),
    PeerKey("TRL", "lora_target_modules", "lora.targets"),
    PeerKey("TRL", "output_dir", "output_dir"),
    PeerKey("TRL", "save_steps", "checkpoint.every"),
    PeerKey("TRL", "save_total_limit", "checkpoint.keep"),
    PeerKey("TRL", "resume_from_checkpoint", "", "the same command again resumes the run: leave it out"),
    PeerKey("TRL", "eval_steps", "eval.every"),
    PeerKey("TRL", "eval_strategy", "eval.every", "a number of steps; 0: no evaluation"),
    PeerKey("TRL", "load_best_model_at_end", "checkpoint.best.metric", "keeps that checkpoint: --step best"),
    PeerKey("TRL", "metric_for_best_model", "checkpoint.best.metric", "such as eval/accuracy"),
    PeerKey("TRL", "greater_is_better", "checkpoint.best.mode", "max or min"),
    PeerKey("TRL", "report_to", "logging.trackers", "a list, such as [wandb]"),
    PeerKey("TRL", "logging_steps", "", "every step is written: leave it out"),
    PeerKey("TRL", "num_completions_to_print", "logging.samples_per_step", "in samples.jsonl"),
    PeerKey("TRL", "log_completions", "logging.samples_per_step", "in samples.jsonl"),
    PeerKey("TRL", "seed", "seed"),
    # verl: ppo_trainer.yaml
    PeerKey("verl", "data.train_files", "data.source"),
    PeerKey("verl", "data.val_files", "data.eval_source"),
    PeerKey("verl", "data.prompt_key", "data.columns", "{prompt: ...}"),
    PeerKey("verl", "data.train_batch_size", "grpo.prompts_per_step"),
    PeerKey("verl", "data.max_prompt_length", "data.max_prompt_length", "longer prompts are dropped, never cut"),
    PeerKey("verl", "data.max_response_length", "sampling.max_completion_length"),
    PeerKey("verl", "data.filter_overlong_prompts", "", "always: longer prompts are dropped and counted"),
    PeerKey("verl", "data.shuffle", "", "always, from the seed"),
    PeerKey("verl", "actor_rollout_ref.model.path", "model.source"),
    PeerKey("verl", "actor_rollout_ref.model.enable_gradient_checkpointing", "model.remat", "block"),
    PeerKey("verl", "actor_rollout_ref.model.lora_rank", "lora.rank"),
    PeerKey("verl", "actor_rollout_ref.model.lora_alpha", "lora.alpha"),
    PeerKey("verl", "actor_rollout_ref.model.target_modules", "lora.targets"),
    PeerKey("verl", "actor_rollout_ref.actor.optim.lr", "optimizer.lr"),
    PeerKey("verl", "actor_rollout_ref.actor.optim.lr_warmup_steps", "optimizer.warmup_updates"),
    PeerKey("verl", "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio", "optimizer.warmup_updates", "updates"),
    PeerKey("verl", "actor_rollout_ref.actor.optim.min_lr_ratio", "optimizer.final_lr_ratio"),
    PeerKey("verl", "actor_rollout_ref.actor.optim.warmup_style", "optimizer.schedule"),
    PeerKey("verl", "actor_rollout_ref.actor.optim.weight_decay", "optimizer.weight_decay"),
    PeerKey(
        "verl",
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        "grpo.minibatches",
        "their number: train_batch_size / ppo_mini_batch_size",
    ),
    PeerKey(
        "verl",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
        "grpo.max_tokens_per_microbatch",
        "tokens over all devices; never changes the result",
    ),
    PeerKey(
        "verl",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
        "grpo.max_tokens_per_microbatch",
        "over all devices",
    ),
    PeerKey("verl", "actor_rollout_ref.actor.use_dynamic_bsz", "", "always: pieces are counted in tokens"),
    PeerKey("verl", "actor_rollout_ref.actor.ppo_epochs", "grpo.epochs"),
    PeerKey("verl", "actor_rollout_ref.actor.grad_clip", "optimizer.max_grad_norm"),
    PeerKey("verl", "actor_rollout_ref.actor.clip_ratio", "grpo.epsilon"),
    PeerKey("verl", "actor_rollout_ref.actor.clip_ratio_low", "grpo.epsilon"),
    PeerKey("verl", "actor_rollout_ref.actor.clip_ratio_high", "grpo.epsilon_high"),
    PeerKey("verl", "actor_rollout_ref.actor.clip_ratio_c", "grpo.delta", "caps the ratio, whatever the advantage"),
    PeerKey("verl", "actor_rollout_ref.actor.entropy_coeff", "grpo.entropy_coef"),
    PeerKey("verl", "actor_rollout_ref.actor.use_kl_loss", "grpo.beta", "above 0"),
    PeerKey("verl", "actor_rollout_ref.actor.kl_loss_coef", "grpo.beta"),
    PeerKey("verl", "actor_rollout_ref.actor.kl_loss_type", "grpo.kl_estimator", "low_var_kl: k3; kl: k1; mse: k2"),
    PeerKey(
        "verl",
        "actor_rollout_ref.actor.loss_agg_mode",
        "grpo.loss_type",
        "token-mean: dapo; seq-mean-token-mean: grpo; seq-mean-token-sum-norm: dr_grpo",
    ),
    PeerKey("verl", "actor_rollout_ref.rollout.n", "grpo.group_size", "completions of a prompt"),
    PeerKey("verl", "actor_rollout_ref.rollout.temperature", "sampling.temperature"),
    PeerKey("verl", "actor_rollout_ref.rollout.top_p", "sampling.top_p"),
    PeerKey("verl", "actor_rollout_ref.rollout.top_k", "sampling.top_k", "0: off"),
    PeerKey("verl", "actor_rollout_ref.rollout.name", "", _OWN_SAMPLER),
    PeerKey("verl", "actor_rollout_ref.rollout.gpu_memory_utilization", "sampling.kv_memory"),
    PeerKey("verl", "actor_rollout_ref.rollout.tensor_model_parallel_size", "mesh.tensor", "training's mesh, too"),
    PeerKey("verl", "actor_rollout_ref.rollout.max_num_seqs", "sampling.slots"),
    PeerKey("verl", "actor_rollout_ref.rollout.multi_turn.enable", "rollout.tools", "or rollout.environment"),
    PeerKey("verl", "actor_rollout_ref.rollout.multi_turn.max_assistant_turns", "rollout.max_turns"),
    PeerKey("verl", "actor_rollout_ref.rollout.multi_turn.tool_config_path", "rollout.tools"),
    PeerKey("verl", "algorithm.adv_estimator", "grpo.advantage_estimator", "there is no critic: grpo, rloo, ..."),
    PeerKey("verl", "algorithm.norm_adv_by_std_in_grpo", "grpo.scale_rewards", "false: none"),
    PeerKey("verl", "algorithm.use_kl_in_reward", "grpo.kl_in_reward"),
    PeerKey("verl", "algorithm.kl_ctrl.kl_coef", "grpo.beta"),
    PeerKey("verl", "algorithm.filter_groups.enable", "grpo.dynamic_sampling_rounds", "above 0"),
    PeerKey("verl", "custom_reward_function.path", "rewards.functions", "[{function: path/to/file.py:compute_score}]"),
    PeerKey("verl", "custom_reward_function.name", "rewards.functions", "[{function: path/to/file.py:compute_score}]"),
    PeerKey("verl", "trainer.total_training_steps", "grpo.steps"),
    PeerKey("verl", "trainer.total_epochs", "grpo.steps", "rows / grpo.prompts_per_step is one epoch"),
    PeerKey("verl", "trainer.save_freq", "checkpoint.every"),
    PeerKey("verl", "trainer.test_freq", "eval.every"),
    PeerKey("verl", "trainer.val_before_train", "eval.every", "above 0: always before the first step, too"),
    PeerKey("verl", "trainer.logger", "logging.trackers", "a list, such as [wandb]"),
    PeerKey("verl", "trainer.project_name", "logging.tracker_args", "{wandb: {project: ...}}"),
    PeerKey("verl", "trainer.max_actor_ckpt_to_keep", "checkpoint.keep"),
    PeerKey("verl", "trainer.default_local_dir", "output_dir"),
    PeerKey("verl", "trainer.n_gpus_per_node", "mesh.fsdp", "the mesh takes what is there"),
    PeerKey("verl", "trainer.nnodes", "distributed.num_processes", "found by itself on clusters"),
    PeerKey("verl", "trainer.resume_mode", "", "the same command again resumes the run: leave it out"),
    # MaxText: its base.yml
    PeerKey("MaxText", "num_generations", "grpo.group_size", "completions of a prompt"),
    PeerKey("MaxText", "grpo_beta", "grpo.beta"),
    PeerKey("MaxText", "grpo_epsilon", "grpo.epsilon"),
    PeerKey("MaxText", "steps", "grpo.steps"),
    PeerKey("MaxText", "learning_rate", "optimizer.lr"),
    PeerKey("MaxText", "warmup_steps_fraction", "optimizer.warmup_updates", "a number of updates"),
    PeerKey("MaxText", "gradient_clipping_threshold", "optimizer.max_grad_norm"),
    PeerKey("MaxText", "opt_type", "optimizer.name"),
    PeerKey("MaxText", "init_weights_seed", "seed"),
    PeerKey("MaxText", "per_device_batch_size", "grpo.prompts_per_step", _OVER_ALL),
    PeerKey("MaxText", "max_prefill_predict_length", "data.max_prompt_length"),
    PeerKey("MaxText", "max_target_length", "sampling.max_completion_length", "without the prompt"),
    PeerKey("MaxText", "decode_sampling_temperature", "sampling.temperature"),
    PeerKey("MaxText", "decode_sampling_nucleus_p", "sampling.top_p"),
    PeerKey("MaxText", "decode_sampling_top_k", "sampling.top_k"),
    PeerKey("MaxText", "tokenizer_path", "tokenizer.source"),
    PeerKey("MaxText", "hf_path", "data.source"),
    PeerKey("MaxText", "dataset_path", "data.source", "a file, a folder or a hub id"),
    PeerKey("MaxText", "eval_interval", "eval.every", "0: no evaluation"),
    PeerKey("MaxText", "base_output_directory", "output_dir"),
    PeerKey("MaxText", "run_name", "output_dir"),
    PeerKey("MaxText", "checkpoint_period", "checkpoint.every"),
    PeerKey("MaxText", "load_parameters_path", "model.source"),
    PeerKey("MaxText", "lora_input_adapters_path", "lora.adapter"),
    PeerKey("MaxText", "model_name", "model.source", "a Hugging Face folder or hub id"),
    PeerKey("MaxText", "scan_layers", "model.scan_layers"),
    PeerKey("MaxText", "remat_policy", "model.remat"),
    PeerKey("MaxText", "weight_dtype", "model.param_dtype"),
    PeerKey("MaxText", "mu_dtype", "optimizer.moment_dtype"),
    PeerKey("MaxText", "optimizer_memory_host_offload", "optimizer.offload"),
    PeerKey("MaxText", "ici_data_parallelism", "mesh.data"),
    PeerKey("MaxText", "ici_fsdp_parallelism", "mesh.fsdp"),
    PeerKey("MaxText", "ici_tensor_parallelism", "mesh.tensor"),
    PeerKey("MaxText", "logical_axis_rules", "mesh.rules"),
    PeerKey("MaxText", "compiled_trainstep_file", "compiled_file"),
    # Tunix: GRPOConfig, RolloutConfig, RLTrainingConfig
    PeerKey("Tunix", "num_generations", "grpo.group_size", "completions of a prompt"),
    PeerKey("Tunix", "num_iterations", "grpo.epochs", "passes over a rollout"),
    PeerKey("Tunix", "beta", "grpo.beta"),
    PeerKey("Tunix", "epsilon", "grpo.epsilon"),
    PeerKey("Tunix", "epsilon_high", "grpo.epsilon_high"),
    PeerKey("Tunix", "policy_loss_fn", "grpo.loss_type"),
    PeerKey("Tunix", "loss_algo", "grpo.importance_sampling_level", "gspo-token: sequence"),
    PeerKey("Tunix", "kl_loss_mode", "grpo.kl_estimator", "k1, k2 or k3"),
    PeerKey("Tunix", "advantage_estimator", "grpo.advantage_estimator"),
    PeerKey("Tunix", "max_tokens_to_generate", "sampling.max_completion_length"),
    PeerKey("Tunix", "max_prompt_length", "data.max_prompt_length", "longer prompts are dropped, never cut"),
    PeerKey("Tunix", "kv_cache_size", "", "the sampler computes its cache from lengths and slots: leave it out"),
    PeerKey("Tunix", "temperature", "sampling.temperature"),
    PeerKey("Tunix", "top_p", "sampling.top_p"),
    PeerKey("Tunix", "top_k", "sampling.top_k", "0: off"),
    PeerKey("Tunix", "eos_tokens", "sampling.eos_ids"),
    PeerKey("Tunix", "rollout_engine", "", _OWN_SAMPLER),
    PeerKey("Tunix", "max_steps", "grpo.steps"),
    PeerKey("Tunix", "eval_every_n_steps", "eval.every"),
    PeerKey("Tunix", "mini_batch_size", "grpo.minibatches", "their number"),
    PeerKey("Tunix", "train_micro_batch_size", "grpo.max_tokens_per_microbatch", "tokens over all devices"),
    PeerKey("Tunix", "actor_optimizer", "optimizer.name"),
    PeerKey("Tunix", "checkpoint_root_directory", "output_dir"),
)


def rows_of(key: str, only_whole: bool = False) -> list[PeerKey]:
    """The rows that a key unknown here was probably taken from: those with its whole name, else, unless `only_whole`,
    those that end with its last part, of which sections say nothing (`grpo.num_generations`). A short part (`path`) is
    no name.
    """
    exact = [row for row in PEER_KEYS if row.key == key]
    last = key.rpartition(".")[2]
    if exact or only_whole or len(last) < _LEAST_LETTERS or last == "enable":
        return exact
    return [row for row in PEER_KEYS if row.key.rpartition(".")[2] == last]


def advice(key: str, is_name_of_ours: bool = False) -> str | None:
    """What to say of an unknown key that is a peer's: ours in its place, or why there is none; None for other keys.

    is_name_of_ours: whether a key of ours ends alike, so that only its section may be wrong.
    """
    rows = rows_of(key, only_whole=is_name_of_ours)
    if not rows:
        return None
    found = list(dict.fromkeys(row.ours for row in rows if row.ours))
    peers = ", ".join(dict.fromkeys(row.peer for row in rows))
    notes = "; ".join(dict.fromkeys(row.note for row in rows if row.note))
    said = f"{notes}; " if notes else ""
    if not found:
        return f"{said}{key.rpartition('.')[2]} is of {peers}"
    return f"did you mean {' or '.join(map(repr, found))}? ({said}{key.rpartition('.')[2]} is of {peers})"
