"""Messages of a run before its first step: what runs where, on which data, and what may go wrong."""

import math
import shlex

from jax.sharding import Mesh

from rl.config.load import Config, preset_values
from rl.data.prompts import PairData, PromptData
from rl.data.tokenizer import Tokenizer
from rl.models.config import flatten_specs, parameter_specs
from rl.models.foreign import files as foreign
from rl.models.lora import quantization_of, split
from rl.models.policy import Policy
from rl.run.console import Console
from rl.run.output import RunOutput
from rl.sampler.token_draw import SamplingParams
from rl.state.optimizer import updates_per_step
from rl.state.origin import Origin
from rl.training.packing import PackingPlan

_FULL_LR, _ADAPTER_LR = (1e-7, 2e-5), (1e-6, 5e-4)  # in which GRPO usually learns
_LARGE = 100_000_000  # parameters; smaller models take higher rates
_ADAPTIVE = ("adamw", "adafactor", "lion")  # optimizers whose steps are of the size of the learning rate
_NEAR_0 = 0.01


def warn_about_sampling(console: Console, config: Config, sampling: SamplingParams) -> None:
    """Warns when completions come from another distribution than the policy's, and the loss does not correct for it
    or weights every token down.
    """
    grpo, section = config.grpo, config.sampling
    reshaping = [] if grpo.policy_distribution == "sampled" else sampling.reshaping_rules
    rounding = [name for name in ("kv_dtype", "weight_dtype") if getattr(section, name) is not None]
    source = [] if section.source is None else ["source"]
    can_be_exact = not sampling.needs_counts and not source  # by training on the distribution that was drawn from
    correction, takes_as_own = "grpo.sampler_is_correction=true", "the loss takes them for the policy's own"
    has_ratio = grpo.sampler_is_correction or grpo.old_logprobs == "sampler"
    problems = []
    if reshaping and can_be_exact:
        effect = takes_as_own
        if grpo.sampler_is_correction:
            effect = "grpo.sampler_is_correction weights each token by the probability that these rules left there"
        problems.append((reshaping, effect, "set grpo.policy_distribution=sampled, or turn these rules off"))
    elif reshaping and not grpo.sampler_is_correction:
        problems.append((reshaping, takes_as_own, f"set {correction}, or turn these rules off"))
    if rounding and not has_ratio:
        problems.append((rounding, takes_as_own, f"set {correction}, or take the policy's own dtype"))
    if source and not has_ratio:
        problems.append((source, takes_as_own, f"set {correction}"))
    for names, effect, way_out in problems:
        rules = ", ".join(f"sampling.{name}" for name in names)
        console.warning(
            f"{rules}: completions come from another distribution than the policy's, and {effect}; {way_out}"
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


def warn_about_learning_rate(console: Console, config: Config, policy: Policy) -> None:
    """Warns of a learning rate with which runs of this kind hardly learn, or fall apart."""
    section, num_parameters = config.optimizer, policy.config.num_parameters
    if section.name not in _ADAPTIVE or (policy.config.lora is None and num_parameters < _LARGE):
        return
    kind, (least, most) = ("adapters", _ADAPTER_LR) if policy.config.lora else ("full weights", _FULL_LR)
    if not least <= section.lr <= most:
        effect = "the policy hardly moves" if section.lr < least else "the policy may fall apart"
        console.warning(
            f"optimizer.lr {section.lr:g} is outside [{least:g}, {most:g}], in which GRPO of {kind} of a model with "
            f"{_count(num_parameters)} parameters usually learns: {effect}; set optimizer.lr, unless this is meant"
        )


def tell_of_loss(console: Console, steps_done: int, loss: float) -> None:
    """Says after the first step, once in a run, that a loss near 0 is no fault."""
    if steps_done == 1 and abs(loss) < _NEAR_0:
        console.message(
            "a loss near 0 is expected on-policy: advantages are centred and ratios are 1, so its value is 0 while its "
            "gradient is not; watch the reward, grad_norm and kl in its place"
        )


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
    for message in (*data.messages, *origin.messages, *foreign.notes(policy), *run.folder.messages):
        console.message(message)
    if problem := foreign.unsharded(policy, mesh.size):
        console.warning(problem)
    grpo = config.grpo
    num_sequences = grpo.prompts_per_step * grpo.group_size
    per_step = f"{grpo.prompts_per_step} prompts x {grpo.group_size} completions = {num_sequences} sequences"
    rows = header(run.path, origin, policy, mesh)
    rows |= {
        "prompts": f"{_num_train(data)}, {len(data.held_out)} held out",
        "step": f"{per_step}, {updates_per_step(config)} update(s)",
        "packing": f"{packing.num_rows} rows x {packing.row_length} tokens a piece",
    }
    if grpo.preset:
        rows["preset " + grpo.preset] = " ".join(f"{key}={value}" for key, value in preset_values(config).items())
    console.table("grpo train", rows)


def header(folder: object, origin: Origin, policy: Policy, mesh: Mesh, is_trained: bool = True) -> dict[str, str]:
    """The first rows of the table that every command with a model prints: which weights, computed how and where.

    folder: of the run; None where there is none. is_trained: whether the command trains.
    """
    config, rows = policy.config, {} if folder is None else {"run folder": str(folder)}
    size, of_adapters = _count(config.num_parameters), ""
    if config.lora:
        num_trained = sum(math.prod(spec.shape) for _, spec in flatten_specs(split(config, parameter_specs(config))[0]))
        of_adapters = f"{_count(num_trained)} of {size} parameters {'train' if is_trained else 'are adapters'}: "
    axes = " ".join(f"{axis}={count}" for axis, count in mesh.shape.items())
    rows |= {
        "model": f"{origin.identity['source'] or 'fresh'}, {config.family}, {size} parameters",
        "policy": f"{policy.flavour}, {config.dtype}, {policy.kernel.title}",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {axes}",
    }
    if lora := policy.config.lora:
        quantization = quantization_of(policy.config)
        base = quantization.dtype if quantization else lora.base_dtype or policy.config.param_dtype
        what = f"rank {lora.rank}, scale {lora.scale:g}, on {' '.join(lora.targets)}; frozen base in {base}"
        rows["adapters"] = of_adapters + what
    return rows


def what_next(kind: str, folder: object) -> str:
    """What can be done with a run that has ended. kind: "grpo" or "sft"."""
    run = shlex.quote(str(folder))
    first = f"`grpo train CONFIG model.source={run}/export`, " if kind == "sft" else f"`grpo report {run}`, "
    return f"{first}`grpo eval {run}`, `grpo sample {run} --prompt TEXT`, `grpo export {run} FOLDER`"


def _count(number: int) -> str:
    """Parameters in thousands, millions or billions, with three digits or so."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.{1 if number < 100 * size else 0}f}{unit}"
    return str(number)


def _num_train(data: PromptData) -> str:
    if data.are_made_up:
        return "made by the environment"
    if data.stream is None:
        return f"{len(data.train)} train"
    return f"{data.stream.num_rows} rows in {data.stream.num_blocks} blocks to train, if they fit"


def announce_supervised(
    console: Console,
    config: Config,
    pairs: PairData,
    num_held_out: int,
    origin: Origin,
    tokenizer: Tokenizer,
    policy: Policy,
    mesh: Mesh,
    packing: PackingPlan,
    run: RunOutput,
) -> None:
    """The same for supervised fine-tuning."""
    for message in (*pairs.messages, *origin.messages, *foreign.notes(policy), *run.folder.messages):
        console.message(message)
    rows = header(run.path, origin, policy, mesh)
    rows |= {
        "pairs": f"{len(pairs.rows)} train, {num_held_out} held out",
        "step": f"{config.sft.batch_size} pairs, 1 update(s)",
        "packing": f"{packing.num_rows} rows x {packing.row_length} tokens a piece",
    }
    console.table("grpo sft", rows)
    warn_about_template(console, tokenizer)
