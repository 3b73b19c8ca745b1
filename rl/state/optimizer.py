"""Optimizer and learning-rate schedule from the config, and the share of an update that rounding of the weights loses.

In: the `optimizer` section, and a policy for the names, axes and dtype of its parameters. Out: an optax schedule and an
optax transformation. Every optimizer has the same parts in the same order: clipping, direction, weight decay, learning
rate, groups. Schedules count optimizer updates, never steps or micro-batches. Not here: gradients, and the state of the
optimizer on a mesh (`rl.state.states`).
"""

import fnmatch
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from rl.config.load import Config
from rl.config.sections import LearningRateGroup, OptimizerSection
from rl.models.config import LORA_A, LORA_B, ParameterSpec, flatten_specs, parameter_specs
from rl.models.lora import split
from rl.models.ops import widen
from rl.models.policy import Policy

_MAX_LOST_SHARE = 0.5  # of an update's non-zero entries; a larger share is warned about


def create_training_optimizer(
    config: Config, policy: Policy, num_updates: int | None = None
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The schedule (update count -> learning rate) and the optax transformation of a run.

    Weight decay is decoupled (https://arxiv.org/abs/1711.05101) for every optimizer: an update takes
    learning rate * weight_decay * weight from a weight. A group's `lr_scale` multiplies the whole update, decay
    included.

    Args:
      config: its `optimizer` section is read.
      policy: has the parameters' names and axes, and their dtype, which the first moment takes where the config names
        none.
      num_updates: optimizer updates of the whole run; None: steps * minibatches * epochs, as in a GRPO run.

    Raises:
      ValueError: all weights of a quantised model would be trained, warm-up and decay do not fit the run, or a pattern
        decides about no parameter (with adapters: a learning-rate pattern about no adapter).
    """
    section = config.optimizer
    if policy.config.quantization is not None and policy.config.lora is None:
        stored = policy.config.quantization.dtype
        if not policy.config.takes_adapters:
            raise ValueError(
                f"a model other than the toolkit's own decoder has no adapters to train, got one stored in {stored}; "
                "set model.source or model.weights to the weights it was quantised from"
            )
        raise ValueError(
            f"a model stored in {stored} must be trained through adapters, got lora.rank 0; set lora.rank (QLoRA), or "
            "model.source to the weights it was quantised from"
        )
    if num_updates is None:
        num_updates = config.grpo.steps * updates_per_step(config)
    horizon = _horizon(section, num_updates)
    all_specs = parameter_specs(policy.config)
    specs = _by_name(split(policy.config, all_specs)[0])
    is_asked_for = policy.config.has_known_names or section.weight_decay
    for pattern in section.weight_decay_params if is_asked_for else ():
        _check_pattern("optimizer.weight_decay_params", pattern, _by_name(all_specs))
    _check_groups(section.lr_groups, specs)
    schedule = _schedule(section, horizon)
    direction = _DIRECTIONS[section.name](section, section.moment_dtype or str(widen(policy.config.param_dtype)), specs)
    decay = optax.add_decayed_weights(
        section.weight_decay, mask=functools.partial(decay_mask, patterns=section.weight_decay_params)
    )
    clip = [_clip_by_global_norm(section.max_grad_norm)] if section.max_grad_norm else []
    groups = [_scale_by_name(functools.partial(_lr_scale, section.lr_groups))] if section.lr_groups else []
    update = optax.chain(direction, decay, optax.scale_by_learning_rate(schedule))
    return schedule, optax.chain(*clip, update, *groups)


def updates_per_step(config: Config) -> int:
    """Optimizer updates of one GRPO step."""
    return config.grpo.minibatches * config.grpo.epochs


def last_lr(schedule: optax.Schedule, num_updates: int, num_skipped: int) -> float:
    """The learning rate of the last update that was made: `num_updates` less `num_skipped`. Before the first update,
    its learning rate. Schedules count updates that were made.
    """
    return float(np.asarray(schedule(max(num_updates - num_skipped - 1, 0))))


def shortest_run(section: OptimizerSection) -> int:
    """The smallest number of updates of a run into which warm-up and decay fit."""
    decay_updates = section.decay_updates if section.schedule == "wsd" else None
    return section.warmup_updates + (decay_updates or 1)


def decay_mask(params: Any, patterns: Sequence[str]) -> Any:
    """True for the leaves with weight decay: those whose name ("layers_0/mlp/up_proj/kernel") matches a pattern. An
    adapter also matches by the name of its kernel.
    """
    return _map_names(lambda name: any(_matches(name, pattern) for pattern in patterns), params)


def rounding_loss(params: Any, updates: Any) -> jax.Array:
    """The share of the non-zero entries of `updates` that do not change their weight, because the sum rounds back to
    it.

    A bfloat16 weight has 8 significant bits, so an update below 2^-9 of it is lost. With learning rates of 1e-6 nearly
    all updates are. Weights in float32 under activations in bfloat16 avoid this, see https://arxiv.org/abs/1710.03740,
    section 3.1.

    Args:
      params: float weights of any shapes.
      updates: the same tree, as `optax.apply_updates` would add it to `params`.

    Returns:
      float32 [], in [0, 1]; 0 when every entry is zero.
    """

    def count(weight: jax.Array, update: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Compared as bits, because compilers may compare floats before they round them.
        bits = jnp.dtype(f"uint{8 * weight.dtype.itemsize}")
        as_bits = lambda x: jax.lax.bitcast_convert_type(x, bits)  # noqa: E731
        is_update = update != 0
        is_lost = is_update & (as_bits(optax.apply_updates(weight, update)) == as_bits(weight))
        return _count(is_lost), _count(is_update)

    counts = [count(*pair) for pair in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True)]
    num_lost, num_updates = (sum(column) for column in zip(*counts, strict=True))
    return jnp.asarray(num_lost / jnp.maximum(num_updates, 1), jnp.float32)


def rounding_problems(metrics: Mapping[str, float]) -> list[str]:
    """Warnings about the rounding of a step's updates; empty where it is not measured."""
    share = metrics.get("update/lost_share", 0.0)
    if share <= _MAX_LOST_SHARE:
        return []
    problem = f"{share:.1%} of the weight updates were lost to rounding"
    return [f"{problem}; set model.param_dtype to float32 (model.dtype may stay as it is), or raise optimizer.lr"]


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` whose `update` takes a known norm as `grad_norm`."""

    def update(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        is_short = norm < max_norm
        clipped = jax.tree.map(lambda x: jnp.where(is_short, x, x / norm.astype(x.dtype) * max_norm), updates)
        return clipped, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


# -- directions: the update before weight decay and learning rate


def _adamw(section: OptimizerSection, moment_dtype: str, specs: Mapping[str, ParameterSpec]) -> Any:
    """Adam's direction (https://arxiv.org/abs/1412.6980).

    The second moment is float32 or wider, unless the config says bfloat16. With b2 = 0.999 a bfloat16 moment would lose
    each decay to rounding, and never come down after a spike.
    """
    adam = optax.scale_by_adam(section.b1, section.b2, section.eps, mu_dtype=moment_dtype)

    def init(params: Any) -> optax.ScaleByAdamState:
        state: Any = adam.init(params)
        # An update keeps the moment's dtype, so only the start is cast.
        return state._replace(
            nu=jax.tree.map(lambda x: x.astype(section.second_moment_dtype or widen(x.dtype)), state.nu)
        )

    return optax.GradientTransformation(init, adam.update)


def _adafactor(section: OptimizerSection, moment_dtype: str, specs: Mapping[str, ParameterSpec]) -> Any:
    """Adafactor, https://arxiv.org/abs/1804.04235, algorithms 4 and 5 without a first moment: decay 1 -
    t^-0.8, clip 1.
    """
    scale = [optax.scale_by_param_block_rms()] if section.adafactor_parameter_scale else []
    return optax.chain(
        _wide(optax.scale_by_factored_rms(min_dim_size_to_factor=section.adafactor_min_dim)),
        optax.clip_by_block_rms(1.0),
        *scale,
    )


def _wide(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation with a state of float32 or wider, where optax takes the dtype of the weights.

    After 100 updates a bfloat16 moment should take in a fortieth of each squared gradient; after 5000 the change is
    lost to rounding.
    """

    def widened(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(widen(x.dtype)), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return transformation.update(widened(updates), state, widened(params))

    return optax.GradientTransformation(lambda params: transformation.init(widened(params)), update)


def _lion(section: OptimizerSection, moment_dtype: str, specs: Mapping[str, ParameterSpec]) -> Any:
    """Lion's direction, https://arxiv.org/abs/2302.06675, algorithm 2."""
    return optax.scale_by_lion(section.lion_b1, section.lion_b2, mu_dtype=moment_dtype)


def _muon(section: OptimizerSection, moment_dtype: str, specs: Mapping[str, ParameterSpec]) -> Any:
    """Muon, https://kellerjordan.github.io/posts/muon, for the matrices of the layers; AdamW for embedding, head, norms
    and biases.

    A kernel counts as one matrix, input dims x output dims. The size of its step is `muon_rms` * sqrt(larger side)
    (https://arxiv.org/abs/2502.16982, section 2.2). A matrix then moves as far as under AdamW, so one learning rate
    serves both. With `muon_rms` null it is sqrt(max(1, output / input)).
    """
    matrices = {name: _muon_matrix(spec, section.muon_rms) for name, spec in specs.items() if _is_hidden_matrix(spec)}
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=section.muon_momentum,
            mu_dtype=moment_dtype,
            weight_dimension_numbers=lambda tree: _map_names(lambda name: matrices[name].dims, tree),
        ),
        _scale_by_name(lambda name: matrices[name].step_size),
    )
    return optax.partition(
        {"muon": muon, "adamw": _adamw(section, moment_dtype, specs)},
        lambda tree: _map_names(lambda name: "muon" if name in matrices else "adamw", tree),
    )


def _sgd(section: OptimizerSection, moment_dtype: str, specs: Mapping[str, ParameterSpec]) -> Any:
    """The gradient, or with momentum the sum of gradients that decays by `sgd_momentum`."""
    momentum = section.sgd_momentum
    return optax.trace(momentum, accumulator_dtype=moment_dtype) if momentum else optax.identity()


_DIRECTIONS: dict[str, Callable[[OptimizerSection, str, Mapping[str, ParameterSpec]], Any]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


class _MuonMatrix(NamedTuple):
    dims: optax.contrib.MuonDimensionNumbers
    step_size: float


def _is_hidden_matrix(spec: ParameterSpec) -> bool:
    return len(spec.axes) > 1 and ("embed" in spec.axes or "lora" in spec.axes) and "vocab" not in spec.axes


def _muon_matrix(spec: ParameterSpec, rms: float | None) -> _MuonMatrix:
    """How Muon treats a kernel that reads the residual stream, ("embed", ...), or writes to it, (..., "embed"), and an
    adapter, (..., "lora") or ("lora", ...).
    """
    dims = tuple(range(len(spec.axes)))
    num_input_dims = 1 if spec.axes[0] in ("embed", "lora") else len(dims) - 1
    inputs, outputs = math.prod(spec.shape[:num_input_dims]), math.prod(spec.shape[num_input_dims:])
    step_size = math.sqrt(max(1.0, outputs / inputs)) if rms is None else rms * math.sqrt(max(inputs, outputs))
    return _MuonMatrix(optax.contrib.MuonDimensionNumbers(dims[:num_input_dims], dims[num_input_dims:]), step_size)


# -- schedules


def _schedule(section: OptimizerSection, num_updates: int) -> optax.Schedule:
    lr, final_lr, warmup = section.lr, section.lr * section.final_lr_ratio, section.warmup_updates
    remaining = max(num_updates - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "linear": lambda: optax.linear_schedule(lr, final_lr, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(lr, remaining, alpha=section.final_lr_ratio),
        "wsd": lambda: _stable_then_decay(lr, final_lr, remaining, section.decay_updates or 0),
    }[section.schedule]()
    if not warmup:
        return after
    # Update number 0 moves already: the ramp runs from lr / warmup to lr.
    ramp = optax.linear_schedule(lr / warmup, lr, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def _stable_then_decay(lr: float, final_lr: float, num_updates: int, decay_updates: int) -> optax.Schedule:
    """The part after the warm-up of warm-up, stable, decay (https://arxiv.org/abs/2404.06395, section 4), with linear
    decay.
    """
    decay = optax.linear_schedule(lr, final_lr, decay_updates)
    return optax.join_schedules([optax.constant_schedule(lr), decay], [num_updates - decay_updates])


def _horizon(section: OptimizerSection, num_updates: int) -> int:
    """The number of updates over which the schedule runs, in a run of `num_updates`."""
    horizon = section.schedule_updates or num_updates
    if horizon < num_updates and not section.final_lr_ratio:
        raise ValueError(
            f"optimizer.schedule_updates must be >= {num_updates}, the updates of the run, where "
            f"optimizer.final_lr_ratio is 0, got {horizon}: the learning rate would be 0 after these; raise it, or go "
            "on with another schedule in a new folder (grpo train RUN --branch FOLDER)"
        )
    _check_length(section, horizon)
    return horizon


def _check_length(section: OptimizerSection, num_updates: int) -> None:
    warmup = section.warmup_updates
    if warmup and warmup >= num_updates:
        raise ValueError(
            f"optimizer.warmup_updates must be below the run's number of updates ({num_updates}), got {warmup}; for a "
            "short trial set optimizer.warmup_updates=0"
        )
    if shortest_run(section) > num_updates:
        raise ValueError(
            f"optimizer.decay_updates must be at most {num_updates - warmup}, what the warm-up leaves of the run's "
            f"{num_updates} updates, got {section.decay_updates}; lower it or make the run longer"
        )


# -- parameters by name


def _by_name(specs: Any) -> dict[str, ParameterSpec]:
    return {"/".join(path): spec for path, spec in flatten_specs(specs)}


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern matches the parameter's name or, for an adapter, its kernel's name."""
    module, _, leaf = name.rpartition("/")
    names = (name, f"{module}/kernel") if leaf in (LORA_A, LORA_B) else (name,)
    return any(fnmatch.fnmatchcase(known, pattern) for known in names)


def _name(path: tuple) -> str:
    """ "layers_0/mlp/up_proj/kernel" of a key path; NNX states have parts below the dict keys, which do not count."""
    return "/".join(str(part.key) for part in path if hasattr(part, "key"))


def _map_names(function: Callable[[str], Any], tree: Any) -> Any:
    """`tree` with `function` of its name at every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function(_name(path)), tree)


def _scale_by_name(factor: Callable[[str], float]) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, update: factor(_name(path)) * update, updates)

    return optax.stateless(scale)


def _lr_scale(groups: Sequence[LearningRateGroup], name: str) -> float:
    """The lr_scale of the first group whose pattern matches; 1 when none does."""
    return next((group.lr_scale for group in groups if _matches(name, group.pattern)), 1.0)


def _check_groups(groups: Sequence[LearningRateGroup], names: Collection[str]) -> None:
    left = list(names)
    for index, group in enumerate(groups):
        key = f"optimizer.lr_groups.{index}.pattern"
        _check_pattern(key, group.pattern, names)
        rest = [name for name in left if not _matches(name, group.pattern)]
        if len(rest) == len(left):
            raise ValueError(
                f"{key} must match a parameter that no earlier entry matches, got {group.pattern!r}; the first match "
                "decides, so put special patterns before general ones"
            )
        left = rest


def _check_pattern(key: str, pattern: str, names: Collection[str]) -> None:
    if not any(_matches(name, pattern) for name in names):
        layers_as_one = dict.fromkeys(re.sub(r"^layers_\d+/", "layers_*/", name) for name in names)
        raise ValueError(
            f"{key} must match the name of a parameter (* stands for any characters), got {pattern!r}; the names are "
            + ", ".join(layers_as_one)
        )


def _count(mask: jax.Array) -> jax.Array:
    """The number of true entries as float32. The last dim is counted in integers, because float sums of ones stop at
    2^24.
    """
    return jnp.sum(jnp.sum(jnp.atleast_1d(mask), axis=-1, dtype=jnp.int32).astype(jnp.float32))
