"""One optimizer update as one compiled function, `(state, minibatch) -> (state, metrics)`, for every policy and loss.

In: a `PureState` and a packed `Minibatch`. Out: the next state (argument 0 is donated) and the sums for the metrics.
The pieces of a minibatch run one after the other inside the function. Every denominator is that of the whole minibatch,
so the number and size of pieces do not change the result. An update whose loss or gradient norm is not finite is
skipped: weights and optimizer state stay as they are, bit for bit. Each update also measures how far its log-probs are
from the sampler's (`_difference`). `token_logprobs_program` runs the same rows without a gradient, for old and
reference log-probs, or entropies.

Legend: M pieces, R rows, T token positions, N completion tokens of a row, C completions of a row, L tokens of a
completion, B = R * C sequences of a piece, D model.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from rl.algorithms.loss_metrics import MetricSums, combine_sums, zero_sums
from rl.algorithms.loss_types import Denominators, LossConfig, LossInputs
from rl.algorithms.losses import clipped_tokens, denominators_for, grpo_loss
from rl.devices.mesh import ROWS, from_host_memory, input_sharding, is_on_cpu, num_row_shards, replicated, row_sharding
from rl.devices.programs import Program, callable_of
from rl.models.drawn_from import DrawnFrom
from rl.models.inputs import PADDING_GROUP
from rl.models.logprobs import token_logprobs
from rl.models.ops import widen
from rl.models.policy import Params, Policy
from rl.models.scanned import stack_runs, unstack_runs
from rl.models.train_state import PureState
from rl.models.trainable import Trainable
from rl.state.optimizer import rounding_loss
from rl.training.packing import Batch

TRAIN_STEP = "train step"  # the program's name in a file of compiled ones
# Names, in compiled programs, of the loops whose lengths are numbers of the batch.
MICROBATCH_LOOP, SHORT_MICROBATCH_LOOP = "microbatches", "short microbatches"


class Minibatch(NamedTuple):
    """Everything on which one update depends, besides the state.

    Attributes:
      batch: packed rows of the minibatch.
      num_items_in_batch: int32 [], trained tokens of the whole rollout batch, of which the minibatch is a part.
      entropy_coef: float [], the coefficient of the entropy bonus in this update.
      entropy_MRCL: the policy's entropies now, where the loss selects tokens by entropy; None otherwise.
      on_policy: bool [], whether the update's own log-probs replace the batch's old ones. Before the first update on a
        rollout the two differ by rounding only, and the replacement makes the ratio exactly 1. Where an old log-prob is
        NaN (unknown), the update's own is always taken.
      num_left_out_sequences, num_left_out_tokens: int32 [], completions and their trained tokens that belong to the
        minibatch and are not in the batch, because their part of the loss is 0; None: there are none.
    """

    batch: Batch
    num_items_in_batch: Any
    entropy_coef: Any
    entropy_MRCL: Any = None
    on_policy: Any = False
    num_left_out_sequences: Any = None
    num_left_out_tokens: Any = None


class UpdateMetrics(NamedTuple):
    """The measurements of one update.

    Attributes:
      loss: scalar.
      sums: sums over the whole minibatch, from which `rl.algorithms.loss_metrics.finish_metrics` makes metrics.
      grad_norm: the global norm of the gradient before clipping.
      is_applied: bool [], whether loss and gradient norm were finite; otherwise the update was skipped.
      difference: the absolute difference between the policy's present log-probs and the sampler's.
      lost_share: the share of the non-zero updates of single weights that rounding discarded; None for weights in
        float32 or wider.
      tokens: of single tokens; None unless they are kept.
    """

    loss: jax.Array
    sums: MetricSums
    grad_norm: jax.Array
    is_applied: jax.Array
    difference: "Difference"
    lost_share: jax.Array | None
    tokens: "TokenMeasures | None" = None


class TokenMeasures(NamedTuple):
    """What an update measures of each token, [M, R, C, L], 0 on padding.

    Attributes:
      logprobs_MRCL: of the policy before the update.
      clipped_MRCL: bool, where the clip holds the gradient back; None where the ratio is 1 because there are no old
        log-probs, and for losses without a clip.
    """

    logprobs_MRCL: jax.Array
    clipped_MRCL: jax.Array | None


TrainStep = Callable[[PureState, Minibatch], tuple[PureState, UpdateMetrics]]


class Difference(NamedTuple):
    """Sum, maximum and number of absolute differences. Pieces merge exactly."""

    total: jax.Array
    highest: jax.Array
    count: jax.Array

    def merge(self, other: "Difference") -> "Difference":
        """The difference over both sets."""
        return Difference(self.total + other.total, jnp.maximum(self.highest, other.highest), self.count + other.count)


def jit_train_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    loss_config: LossConfig,
    state_shardings: PureState,
    *,
    mesh: Mesh,
    rules: Mapping[str, Sequence[str]],
    temperature: float,
    chunk_size: int | None,
    minibatches_per_rollout: int,
    shorter_lengths: Sequence[int] = (),
    max_sequences: int = 1,
    drawn_from: DrawnFrom | None = None,
    keeps_tokens: bool = False,
) -> TrainStep:
    """The compiled update. The state is donated, so the caller must not use its argument again.

    Where a part of the weights is frozen, only the other part and its moments are trained and donated. The frozen
    weights have no gradient, and the next state holds the same arrays.

    Args:
      state_shardings: a `NamedSharding` for each leaf of the state, in and out.
      mesh: the mesh of the update. `rules["batch"]` names the axes that cut rows.
      temperature: the temperature of the rollouts, at which all log-probs are computed.
      chunk_size: tokens of each row of a piece whose logits exist at one time.
      minibatches_per_rollout: updates of one pass over a rollout batch.
      shorter_lengths, max_sequences: those of the `PackingPlan`.
      drawn_from: the rules of the distribution that all log-probs are under; None: the whole softmax.
      keeps_tokens: whether `UpdateMetrics.tokens` is given.
    """
    program = update_program(
        policy,
        optimizer,
        loss_config,
        state_shardings,
        mesh=mesh,
        rules=rules,
        temperature=temperature,
        chunk_size=chunk_size,
        minibatches_per_rollout=minibatches_per_rollout,
        shorter_lengths=shorter_lengths,
        max_sequences=max_sequences,
        drawn_from=drawn_from,
        keeps_tokens=keeps_tokens,
    )
    update = callable_of(TRAIN_STEP, program)
    trainable = Trainable(policy)
    if not trainable.has_frozen:
        return update

    def train_step(state: PureState, minibatch: Minibatch) -> tuple[PureState, UpdateMetrics]:
        moving, frozen, minibatch = update_arguments(policy, state, minibatch)
        moved, metrics = update(moving, frozen, minibatch)
        return moved._replace(params=trainable.join(moved.params, frozen)), metrics

    return train_step


def update_arguments(policy: Policy, state: PureState, minibatch: Minibatch) -> tuple[Any, ...]:
    """The arguments of `update_program` for this state and minibatch, which may hold arrays, shapes or shardings."""
    trainable = Trainable(policy)
    if not trainable.has_frozen:
        return state, minibatch
    trained, frozen = trainable.split(state.params)
    return state._replace(params=trained), frozen, minibatch


def update_program(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    loss_config: LossConfig,
    state_shardings: PureState,
    *,
    mesh: Mesh,
    rules: Mapping[str, Sequence[str]],
    temperature: float,
    chunk_size: int | None,
    minibatches_per_rollout: int,
    shorter_lengths: Sequence[int] = (),
    max_sequences: int = 1,
    drawn_from: DrawnFrom | None = None,
    keeps_tokens: bool = False,
) -> Program:
    """The program of `jit_train_step`: (state, minibatch) -> (state, metrics). With frozen weights it is (trained
    state, frozen weights, minibatch) -> (trained state, metrics). Argument 0 is donated.
    """

    trainable, transformation = Trainable(policy), optax.with_extra_args_support(optimizer)

    def piece_loss(trained: Params, frozen: Params, piece: Batch, denominators: Denominators, on_policy: jax.Array):
        params = trainable.join(trained, frozen)
        logprobs_BL, entropy_BL = _piece_logprobs(
            policy, params, piece, temperature, chunk_size, mesh, rules, True, drawn_from
        )
        return loss_of(logprobs_BL, entropy_BL, piece, denominators, on_policy)

    def loss_of(
        logprobs_BL: jax.Array,
        entropy_BL: jax.Array | None,
        piece: Batch,
        denominators: Denominators,
        on_policy: jax.Array,
    ):
        constant_BL = jax.lax.stop_gradient(logprobs_BL)  # old log-probs and a measurement must get no gradient
        inputs = _loss_inputs(piece)
        if inputs.old_logprobs_BT is not None:
            is_now_BL = on_policy | jnp.isnan(inputs.old_logprobs_BT)
            inputs = inputs._replace(old_logprobs_BT=jnp.where(is_now_BL, constant_BL, inputs.old_logprobs_BT))
        loss, sums = grpo_loss(logprobs_BL, entropy_BL, inputs, denominators, loss_config)
        tokens = None
        if keeps_tokens:
            clipped_BL = None if inputs.old_logprobs_BT is None else clipped_tokens(constant_BL, inputs, loss_config)
            tokens = TokenMeasures(constant_BL, clipped_BL)
        return loss, (sums, _difference(constant_BL, piece), tokens)

    def update(state: PureState, frozen: Params, minibatch: Minibatch) -> tuple[PureState, UpdateMetrics]:
        batch = minibatch.batch
        denominators = _denominators(minibatch, loss_config, minibatches_per_rollout)
        value_and_grad = jax.value_and_grad(piece_loss, has_aux=True)
        constants = (denominators, minibatch.on_policy)

        def gradient(piece: Batch):
            value, grads = value_and_grad(state.params, frozen, piece, *constants)
            # With layers in a loop the gradient is stacked. It is added up and measured in that form, which is a few
            # arrays.
            return value, stack_runs(policy.config, grads)

        def add_piece(m, piece, carry):
            loss, grads, sums, difference, tokens = carry
            (piece_value, (piece_sums, piece_difference, piece_tokens)), piece_grads = gradient(piece)
            grads = jax.tree.map(lambda total, part: total + part.astype(total.dtype), grads, piece_grads)
            sums, difference = combine_sums(sums, piece_sums), difference.merge(piece_difference)
            return loss + piece_value, grads, sums, difference, jax.tree.map(partial(_placed, m), tokens, piece_tokens)

        # Of the shapes of what is added up the model's gradient is no part: tracing it once more would take seconds.
        M, R, C, L = batch.mask_MRCL.shape
        values_BL = jax.ShapeDtypeStruct((R * C, L), _logprob_dtype(policy, trainable.join(state.params, frozen)))
        piece = jax.eval_shape(_piece, batch, 0)
        loss, (sums, difference, tokens) = jax.eval_shape(loss_of, values_BL, values_BL, piece, *constants)
        grads = jax.eval_shape(lambda: stack_runs(policy.config, state.params))
        # In bfloat16 a sum of hundreds of pieces would lose pieces below 2^-9 of the sum.
        wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, widen(x.dtype)), grads)
        whole = jax.tree.map(lambda like: jax.ShapeDtypeStruct((M, R, C, L), like.dtype), tokens)
        start = (_zeros(loss), _zeros(wide), zero_sums(sums), _zeros(difference), _zeros(whole))
        found = _over_pieces(batch, shorter_lengths, max_sequences, add_piece, start)
        loss, sum_of_grads, sums, difference, tokens = found
        grads = jax.tree.map(lambda total, like: total.astype(like.dtype), sum_of_grads, grads)
        grad_norm = optax.tree.norm(sum_of_grads)
        is_applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def apply(_, carry):
            params, opt_state, lost_share = carry
            by_layer = unstack_runs(policy.config, grads)
            updates, opt_state = transformation.update(by_layer, opt_state, params, grad_norm=grad_norm)
            if lost_share is not None:
                lost_share = rounding_loss(params, updates)
            return optax.apply_updates(params, updates), opt_state, lost_share

        # A loop of one round or none, because it updates its carry in place. A conditional would hold both states.
        lost_share = jnp.float32(0) if jnp.finfo(policy.config.param_dtype).bits < 32 else None
        # Moments in the host's memory come to the devices here, and leave as outputs.
        carry = (state.params, from_host_memory(state.opt_state, state_shardings.opt_state), lost_share)
        params, opt_state, lost_share = jax.lax.fori_loop(0, is_applied.astype(jnp.int32), apply, carry)
        metrics = UpdateMetrics(loss, sums, grad_norm, is_applied, difference, lost_share, tokens)
        return PureState(state.step + 1, params, opt_state, state.rng), metrics

    everywhere: Any = replicated(mesh)
    arguments = update_arguments(policy, state_shardings, minibatch_shardings(mesh, rules))
    moving, of_tokens = arguments[0], batch_shardings(mesh, rules).mask_MRCL
    of_metrics: Any = {**dict.fromkeys(UpdateMetrics._fields, everywhere), "tokens": of_tokens}
    measured = UpdateMetrics(**of_metrics)
    if not trainable.has_frozen:
        return Program(lambda state, minibatch: update(state, {}, minibatch), arguments, (moving, measured), (0,))
    return Program(update, arguments, (moving, measured), (0,))


def token_logprobs_program(
    policy: Policy,
    param_shardings: Any,
    *,
    mesh: Mesh,
    rules: Mapping[str, Sequence[str]],
    temperature: float,
    chunk_size: int | None,
    with_entropy: bool,
    shorter_lengths: Sequence[int] = (),
    max_sequences: int = 1,
    drawn_from: DrawnFrom | None = None,
) -> Program:
    """The pass without gradient: (params, batch) -> (log-probs, entropies), both [M, R, C, L] and 0 on padding.
    Entropies are None unless `with_entropy`.

    It runs the rows of the update through the same operations, but the compiler may round differently.
    """

    def logprobs(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        def fill(m, piece, outputs):
            values = _piece_logprobs(
                policy, params, piece, temperature, chunk_size, mesh, rules, with_entropy, drawn_from
            )
            return jax.tree.map(partial(_placed, m), outputs, values)

        empty = jnp.zeros(batch.mask_MRCL.shape, _logprob_dtype(policy, params))
        return _over_pieces(batch, shorter_lengths, max_sequences, fill, (empty, empty if with_entropy else None))

    rows = batch_shardings(mesh, rules)
    return Program(logprobs, (param_shardings, rows), (rows.mask_MRCL, rows.mask_MRCL))


def minibatch_axes() -> Minibatch:
    """The tuple of logical axis names of every field of a `Minibatch`; None for a dim that is never cut."""
    batch = Batch(**{name: _axes_of(name) for name in Batch._fields})
    return Minibatch(batch, **{name: _axes_of(name) for name in Minibatch._fields if name != "batch"})


def minibatch_shardings(mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> Minibatch:
    """A sharding for each field of a `Minibatch`, from the rules and `minibatch_axes`."""
    return jax.tree.map(
        lambda names: input_sharding(names, mesh, rules), minibatch_axes(), is_leaf=lambda x: type(x) is tuple
    )


def batch_shardings(mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> Batch:
    """A sharding for each field of a `Batch`, as in `minibatch_shardings`."""
    return minibatch_shardings(mesh, rules).batch


def _axes_of(field: str) -> tuple[str | None, ...]:
    """The logical axes of an input, whose dims are the capital letters at the end of its name; () for a scalar."""
    dims = field.rpartition("_")[2]
    return tuple(ROWS if dim == "R" else None for dim in dims) if dims.isupper() else ()


def _denominators(minibatch: Minibatch, config: LossConfig, minibatches_per_rollout: int) -> Denominators:
    """Counts of the whole minibatch. One minibatch is one update, so nothing is accumulated over minibatches."""
    batch = minibatch.batch
    length = batch.mask_MRCL.shape[-1]
    counts = denominators_for(
        batch.mask_MRCL.reshape(-1, length),
        batch.sequence_mask_MRC.reshape(-1),
        _flat(minibatch.entropy_MRCL, length),
        config,
        entropy_coef=minibatch.entropy_coef,
        advantages_B=batch.advantages_MRC.reshape(-1),
        num_items_in_batch=minibatch.num_items_in_batch,
        steps_per_generation=minibatches_per_rollout,
    )
    if minibatch.num_left_out_sequences is None:
        return counts
    return counts._replace(
        num_sequences=counts.num_sequences + minibatch.num_left_out_sequences,
        num_tokens=counts.num_tokens + minibatch.num_left_out_tokens,
    )


def _placed(m: jax.Array, whole_MRCL: jax.Array, piece_BL: jax.Array) -> jax.Array:
    """The array of all pieces with the values of piece m."""
    return jax.lax.dynamic_update_index_in_dim(whole_MRCL, piece_BL.reshape(whole_MRCL.shape[1:]), m, 0)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)


def _piece(batch: Batch, m: Any) -> Batch:
    """Piece m, without its leading dim."""
    fields = batch._replace(num_microbatches=None)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, 0, keepdims=False), fields)


def _over_pieces(
    batch: Batch,
    shorter_lengths: Sequence[int],
    max_sequences: int,
    body: Callable[[Any, Batch, Any], Any],
    carry: Any,
) -> Any:
    """carry = body(m, piece m, carry) for every piece in use.

    There is a loop for each length. `pack` filled the rows of pieces in decreasing order, so the first
    pieces are computed whole, the next ones with rows cut to the longest of the shorter lengths, and so on.
    """
    num_sequences = max_sequences * batch.mask_MRCL.shape[-2]

    def loop(name: str, start: Any, end: Any, length: int, carry: Any) -> Any:
        # Predicted tokens are at the front as well: each sequence has one more of them than inputs.
        ends = {"MRT": length, "MRN": length + num_sequences}
        dims = {name: name.rpartition("_")[2][:3] for name, values in batch._asdict().items() if values is not None}
        of_field = {name: ends[first] for name, first in dims.items() if first in ends}

        def cut(m: Any) -> Batch:
            piece = _piece(batch, m)
            return piece._replace(**{name: getattr(piece, name)[:, :end] for name, end in of_field.items()})

        with jax.named_scope(name):
            return jax.lax.fori_loop(start, end, lambda m, carry: body(m, cut(m), carry), carry)

    name, start, length = MICROBATCH_LOOP, jnp.int32(0), batch.tokens_MRT.shape[-1]
    for shorter in sorted(shorter_lengths, reverse=True):
        needs_more_M = jnp.any(batch.group_ids_MRT[:, :, shorter:] != PADDING_GROUP, axis=(1, 2))
        end = jnp.max(jnp.where(needs_more_M, jnp.arange(1, needs_more_M.size + 1, dtype=jnp.int32), 0))
        carry = loop(name, start, end, length, carry)
        name, start, length = SHORT_MICROBATCH_LOOP, end, shorter
    return loop(name, start, batch.num_microbatches, length, carry)


def _piece_logprobs(
    policy: Policy,
    params: Params,
    piece: Batch,
    temperature: float,
    chunk_size: int | None,
    mesh: Mesh,
    rules: Mapping[str, Sequence[str]],
    with_entropy: bool,
    drawn_from: DrawnFrom | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probs and, if asked for, entropies [B, L] of the completion tokens of one piece, 0 on padding."""
    rows: NamedSharding = row_sharding(mesh, rules)
    hidden_RTD = policy.hidden(params, piece.inputs)
    hidden_RND = jnp.take_along_axis(hidden_RTD, piece.predictors_MRN[..., None], axis=1)
    hidden_RND = jax.lax.with_sharding_constraint(hidden_RND, rows)
    logprobs_RN, entropy_RN = token_logprobs(
        policy,
        params,
        hidden_RND,
        piece.targets_MRN,
        temperature,
        chunk_size,
        with_entropy=with_entropy,
        mask_BT=piece.target_mask_MRN,
        num_shards=num_row_shards(mesh, rules),
        on_cpu=is_on_cpu(mesh),
        drawn_from=drawn_from,
        kept_words_BTX=piece.kept_words_MRNX,
    )
    R, C, L = piece.slots_MRCL.shape

    def place(values_RN: jax.Array) -> jax.Array:
        values_RCL = jnp.take_along_axis(values_RN, piece.slots_MRCL.reshape(R, C * L), axis=1)
        return jnp.where(piece.mask_MRCL.reshape(R * C, L) > 0, values_RCL.reshape(R * C, L), 0)

    return place(logprobs_RN), None if entropy_RN is None else place(entropy_RN)


def _logprob_dtype(policy: Policy, params: Params) -> Any:
    """The dtype of log-probs and entropies, which is that of the logits."""
    hidden = jax.ShapeDtypeStruct((1, policy.config.hidden_size), policy.config.dtype)
    return jax.eval_shape(policy.unembed, params, hidden).dtype


def _loss_inputs(piece: Batch) -> LossInputs:
    """The inputs of the loss for one piece: R * C sequences, some of them padding."""
    length = piece.mask_MRCL.shape[-1]
    return LossInputs(
        old_logprobs_BT=_flat(piece.old_logprobs_MRCL, length),
        reference_logprobs_BT=_flat(piece.reference_logprobs_MRCL, length),
        sampler_logprobs_BT=_flat(piece.sampler_logprobs_MRCL, length),
        mask_BT=piece.mask_MRCL.reshape(-1, length),
        advantages_B=piece.advantages_MRC.reshape(-1),
        sequence_mask_B=piece.sequence_mask_MRC.reshape(-1),
        advantages_BT=_flat(piece.advantages_MRCL, length),
    )


def _flat(values: jax.Array | None, length: int) -> jax.Array | None:
    """[..., L] -> [B, L]; None stays None."""
    return None if values is None else values.reshape(-1, length)


def _difference(logprobs_BL: jax.Array, piece: Batch) -> Difference:
    """|policy - sampler| over the tokens that the sampler scored."""
    sampler_BL = piece.rollout_logprobs_MRCL.reshape(logprobs_BL.shape)
    scored_BL = (piece.mask_MRCL.reshape(logprobs_BL.shape) > 0) & jnp.isfinite(sampler_BL)
    difference_BL = jnp.where(scored_BL, jnp.abs(logprobs_BL - jnp.where(scored_BL, sampler_BL, 0)), 0)
    return Difference(jnp.sum(difference_BL), jnp.max(difference_BL), jnp.sum(scored_BL.astype(logprobs_BL.dtype)))
