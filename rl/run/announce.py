"""Messages of a run before its first step: what runs where, on which data, and what may go wrong."""

from jax.sharding import Mesh

from rl.config.load import Config, preset_values
from rl.data.prompts import PairData, PromptData
from rl.data.tokenizer import Tokenizer
from rl.models.foreign import files as foreign
from rl.models.lora import quantization_of
from rl.models.policy import Policy
from rl.run.console import Console
from rl.run.output import RunOutput
from rl.sampler.token_draw import SamplingParams
from rl.state.optimizer import updates_per_step
from rl.state.origin import Origin
from rl.training.packing import PackingPlan


def warn_about_sampling(console: Console, config: Config, sampling: SamplingParams) -> None:
    """Warns when completions come from another distribution than the policy's, and the loss does not correct for it."""
    grpo, section = config.grpo, config.sampling
    others = [name for name in ("source", "kv_dtype", "weight_dtype") if getattr(section, name) is not None]
    reshaping = [] if grpo.policy_distribution == "sampled" else sampling.reshaping_rules
    correction = "grpo.sampler_is_correction=true"
    is_known = not sampling.needs_counts and section.source is None
    for_reshaping = "grpo.policy_distribution=sampled" if is_known else correction
    for rules, way_out in ((reshaping, for_reshaping), (others, correction)):
        is_corrected = grpo.sampler_is_correction or (rules is others and grpo.old_logprobs == "sampler")
        if rules and not is_corrected:
            console.warning(
                f"{', '.join(f'sampling.{name}' for name in rules)}: completions come from another distribution than "
                f"the policy's, and the loss takes them for the policy's own; set {way_out}, or turn these rules off"
            )


def warn_about_prompts(console: Console, config: Config, origin: Origin, tokenizer: Tokenizer) -> None:
    """Says when a pretrained model is asked in another form than its tokenizer's chat template gives."""
    is_trained_so = origin.folder is None or tokenizer.is_of_text_prompts
    if tokenizer.has_chat_template and not config.data.chat and not is_trained_so:
        console.warning(
            "data.chat is false, and the tokenizer has a chat template: prompts are plain text, in which a model that "
            "was trained on chats was never asked; set data.chat=true, unless this is a base model"
        )
    warn_about_template(console, tokenizer)


def warn_about_template(console: Console, tokenizer: Tokenizer) -> None:
    """Says which entries of data.chat_template_kwargs change nothing, and whether prompts change from day to day."""
    for problem in filter(None, (tokenizer.template_kwargs_problem(), tokenizer.date_problem())):
        console.warning(problem)


def announce(
    console: Console,
    config: Config,
    run: RunOutput,
    data: PromptData,
    origin: Origin,
    policy: Policy,
    mesh: Mesh,
    packing: PackingPlan,
) -> None:
    """Prints where the run computes, its data, and the keys of its preset."""
    for message in (*data.messages, *foreign.notes(policy), *run.folder.messages):
        console.message(message)
    if problem := foreign.unsharded(policy, mesh.size):
        console.warning(problem)
    grpo = config.grpo
    num_sequences = grpo.prompts_per_step * grpo.group_size
    per_step = f"{grpo.prompts_per_step} prompts x {grpo.group_size} completions = {num_sequences} sequences"
    size = f"{origin.model_config.num_parameters / 1e6:.1f}M parameters"
    axes = " ".join(f"{axis}={count}" for axis, count in mesh.shape.items())
    rows = {
        "run folder": run.path,
        "model": f"{origin.identity['source'] or 'fresh'}, {origin.model_config.family}, {size}",
        "policy": f"{policy.flavour}, {origin.model_config.dtype}, {policy.kernel.title}",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {axes}",
        "prompts": f"{len(data.train)} train, {len(data.held_out)} held out",
        "step": f"{per_step}, {updates_per_step(config)} update(s)",
        "packing": f"{packing.num_rows} rows x {packing.row_length} tokens a piece",
    }
    if lora := policy.config.lora:
        quantization = quantization_of(policy.config)
        base = quantization.dtype if quantization else lora.base_dtype or policy.config.param_dtype
        rows["adapters"] = f"rank {lora.rank}, scale {lora.scale:g}, on {' '.join(lora.targets)}; frozen base in {base}"
    if grpo.preset:
        rows["preset " + grpo.preset] = " ".join(f"{key}={value}" for key, value in preset_values(config).items())
    console.table("grpo train", rows)


def announce_supervised(
    console: Console,
    pairs: PairData,
    num_held_out: int,
    origin: Origin,
    tokenizer: Tokenizer,
    policy: Policy,
    run: RunOutput,
) -> None:
    """The same for supervised fine-tuning."""
    for message in (*pairs.messages, *foreign.notes(policy), *run.folder.messages):
        console.message(message)
    rows = {
        "run folder": run.path,
        "policy": f"{policy.flavour}, {policy.kernel.title}",
        "pairs": len(pairs.rows),
        "held out": num_held_out,
        "parameters": f"{origin.model_config.num_parameters / 1e6:.1f}M",
    }
    console.table("grpo sft", rows)
    warn_about_template(console, tokenizer)
