"""Training states on a mesh: zero-argument `init_state_fn`s, their shapes and shardings, and states built in place.

In: a policy, an optimizer, a mesh. Out: `PureState`s of the policy and of the reference, each from its own
`init_state_fn`. Reading and writing checkpoints is `rl.state.checkpoint`; reading pretrained weights is
`rl.models.files.hf`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rl.config.load import Config
from rl.devices.mesh import check_rules_are_used, in_host_memory, tree_shardings
from rl.devices.programs import Program, callable_of
from rl.models.config import flatten_specs, logical_axes, parameter_specs
from rl.models.lora import freeze, join, split
from rl.models.policy import Params, Policy
from rl.models.train_state import PureState, TrainState, TrainStateNNX, pure_state
from rl.models.trainable import Trainable
from rl.state.origin import Origin, pretrained_params

WEIGHTS, BASE = "weights", "base"  # the weights that `init_program` need not make: all, or the base beside adapters


@dataclasses.dataclass(frozen=True)
class InitStateFn:
    """A function of no argument that builds an independent fresh state each time it is called.

    It works under `jax.eval_shape` and `jax.jit(out_shardings=...)`. The same seed gives the same weights in both
    flavours.

    Attributes:
      policy: decides the flavour of the state, a `TrainState` or a `TrainStateNNX`.
      optimizer: the policy's optimizer; None for a state that is not trained (reference, decoding).
      seed: the seed of the weights and of the state's base key.
    """

    policy: Policy
    optimizer: optax.GradientTransformation | None
    seed: int

    def __call__(self) -> TrainState | TrainStateNNX:
        init_key, run_key = jax.random.split(jax.random.key(self.seed))
        params = freeze(self.policy.config, self.policy.init(init_key))
        return self.policy.state_class.build(self.policy, params, self.optimizer, jax.random.key_data(run_key))


class AbstractState(NamedTuple):
    """A state without its numbers: three trees of the same structure.

    Attributes:
      shapes: a `jax.ShapeDtypeStruct` for each leaf.
      annotations: a tuple of logical axis names for each leaf (moments have the names of their weight, scalars ()).
      shardings: a `NamedSharding` for each leaf.
    """

    shapes: PureState
    annotations: PureState
    shardings: PureState


def get_abstract_state(
    config: Config, mesh: Mesh, init_state_fn: InitStateFn, is_training: bool = True
) -> AbstractState:
    """Shapes, logical annotations and shardings of the state that `init_state_fn` builds; nothing is computed.

    Args:
      is_training: whether the state has an optimizer; False for decoding.
    """
    # Evaluated outside of any mesh context: some states cannot be traced inside one.
    shapes = jax.eval_shape(lambda: _select(pure_state(init_state_fn()), is_training))
    annotations = _annotate(shapes, init_state_fn.policy)
    check_rules_are_used(annotations.params, config.mesh.rollout_rules, "mesh.rollout_rules")
    check_rules_are_used(annotations.params, config.mesh.rules)
    shardings = tree_shardings(shapes, annotations, mesh, config.mesh.rules)
    if config.optimizer.offload:
        is_moment = [leaf.ndim > 0 for leaf in jax.tree.leaves(shapes.opt_state)]
        leaves, treedef = jax.tree.flatten(shardings.opt_state)
        leaves = [in_host_memory(leaf) if moves else leaf for leaf, moves in zip(leaves, is_moment, strict=True)]
        shardings = shardings._replace(opt_state=jax.tree.unflatten(treedef, leaves))
    return AbstractState(shapes, annotations, shardings)


def get_logical_annotations(config: Config, mesh: Mesh, init_state_fn: InitStateFn) -> PureState:
    """The tuple of logical axis names of every leaf of the state that `init_state_fn` builds."""
    return get_abstract_state(config, mesh, init_state_fn).annotations


def create_sharded_state(
    init_state_fn: InitStateFn,
    mesh: Mesh,
    abstract: AbstractState,
    params: Any | None = None,
) -> PureState:
    """Runs `init_state_fn` under one jit. Each leaf is made on the devices where it stays.

    Args:
      abstract: from `get_abstract_state` with the same mesh. The state has an optimizer if this has one.
      params: weights, already on the mesh, in place of fresh ones, which are then not computed. For a policy with
        adapters they may be the base alone.

    Raises:
      ValueError: `params` do not fit; the message names every path that is missing, extra, or of another shape or
        dtype.
    """
    assert all(s.mesh == mesh for s in jax.tree.leaves(abstract.shardings)), "abstract state of another mesh"
    model_config = init_state_fn.policy.config
    given = None
    if params is not None:
        halves = split(model_config, abstract.shapes.params)
        given = BASE if not split(model_config, params)[0] else WEIGHTS
        check_same_tree(params, halves[1] if given == BASE else abstract.shapes.params, "weights")
    state = callable_of(*init_program(init_state_fn, abstract, given))()
    return state if params is None else state._replace(params=join(state.params, params))


def init_program(init_state_fn: InitStateFn, abstract: AbstractState, given: str | None = None) -> tuple[str, Program]:
    """(name, program) of the program () -> `PureState`, without the weights that are `given`.

    Args:
      abstract: whether it has an optimizer decides whether the state has.
      given: WEIGHTS: all weights; BASE: the weights without adapters; None: no weights, all are drawn.
    """
    is_training = bool(jax.tree.leaves(abstract.shapes.opt_state))
    model_config = init_state_fn.policy.config

    def rest_of(state: PureState) -> PureState:
        if given is None:
            return state
        return state._replace(params=split(model_config, state.params)[0] if given == BASE else {})

    def init() -> PureState:
        # The compiler drops random numbers of weights that are not returned.
        return rest_of(_select(pure_state(init_state_fn()), is_training))

    return "state init" if is_training else "reference init", Program(init, (), rest_of(abstract.shardings))


def frozen_base(config: Config, mesh: Mesh, init_state_fn: InitStateFn, origin: Origin) -> Params:
    """The base beside adapters, read or drawn as at the start of the run; {} without adapters."""
    model_config = init_state_fn.policy.config
    if model_config.lora is None:
        return {}
    init_state_fn = dataclasses.replace(init_state_fn, optimizer=None)
    shardings = get_abstract_state(config, mesh, init_state_fn, is_training=False).shardings.params
    state, _ = setup_decode_state(config, mesh, init_state_fn, pretrained_params(origin, shardings))
    return split(model_config, state.params)[1]


def frozen_reference(policy: Policy, state: PureState) -> PureState:
    """The reference that is the frozen part of the policy: the arrays themselves, for `Trainable.reference_policy`."""
    # Copies of the scalars, because the next update donates the state's own. Its frozen weights are never donated.
    return PureState(jnp.copy(state.step), Trainable(policy).reference_part(state.params), (), jnp.copy(state.rng))


def setup_training_state(
    config: Config, mesh: Mesh, init_state_fn: InitStateFn, params: Any | None = None
) -> tuple[PureState, AbstractState]:
    """The state to train, with its optimizer. `params` (same tree, already on the mesh) replace fresh weights."""
    abstract = get_abstract_state(config, mesh, init_state_fn, is_training=True)
    return create_sharded_state(init_state_fn, mesh, abstract, params), abstract


def setup_decode_state(
    config: Config, mesh: Mesh, init_state_fn: InitStateFn, params: Any | None = None
) -> tuple[PureState, AbstractState]:
    """A state without optimizer: the reference, or the weights to decode with."""
    abstract = get_abstract_state(config, mesh, init_state_fn, is_training=False)
    return create_sharded_state(init_state_fn, mesh, abstract, params), abstract


def check_same_tree(got: Any, want: Any, what: str) -> None:
    """ValueError that names every path that is missing, extra, or has another shape or dtype."""
    got_leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(got)[0]}
    want_leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(want)[0]}
    problems = [f"missing {path}" for path in want_leaves if path not in got_leaves]
    problems += [f"unexpected {path}" for path in got_leaves if path not in want_leaves]
    for path, leaf in want_leaves.items():
        other = got_leaves.get(path)
        if other is not None and (tuple(other.shape), other.dtype) != (tuple(leaf.shape), leaf.dtype):
            problems.append(f"{path} must be {leaf.dtype}{list(leaf.shape)}, got {other.dtype}{list(other.shape)}")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{what} do not fit the model: {'; '.join(problems[:8])}{more}")


def get_first_step(policy: Policy, state: Any, updates_per_step: int = 1) -> int:
    """The step at which a run with this state resumes: updates done, divided by the updates of one step. Takes either
    flavour's state, or a `PureState`.
    """
    del policy  # the state itself can become pure
    return int(pure_state(state).step) // updates_per_step


def _select(state: PureState, is_training: bool) -> PureState:
    return state if is_training else state._replace(opt_state=())


def _annotate(shapes: PureState, policy: Policy) -> PureState:
    """Logical axis names for each leaf.

    Moments lie at their weight's path inside the optimizer's state, and have the weight's names. A moment that was
    reduced over a dim has the names of the other dims. All other leaves have none.
    """
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    weights = jax.tree_util.tree_flatten_with_path(logical_axes(policy.config), is_leaf=is_names)[0]
    axes = {_keys(path): names for path, names in weights}
    weight_shapes = {path: spec.shape for path, spec in flatten_specs(parameter_specs(policy.config))}

    def names(path: tuple, leaf: Any) -> tuple:
        keys = _keys(path)
        # An optimizer that treats parts of the tree differently puts dict keys of its own in front.
        weight = next((keys[start:] for start in range(len(keys)) if keys[start:] in axes), None)
        if weight is not None:
            if _is_scale(path):
                sizes = zip(axes[weight], leaf.shape, strict=True)
                return tuple(None if size == 1 else name for name, size in sizes)
            for kept in _kept_dims(path, weight_shapes[weight]):
                if leaf.shape == tuple(weight_shapes[weight][dim] for dim in kept):
                    return tuple(axes[weight][dim] for dim in kept)
        return (None,) * leaf.ndim

    return jax.tree_util.tree_map_with_path(names, shapes)


def _is_scale(path: tuple) -> bool:
    """Whether a leaf is the scale of a quantised weight, which has size 1 at reduced dims."""
    return isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "scale"


def _kept_dims(path: tuple, shape: tuple[int, ...]) -> list[list[int]]:
    """The dims of a weight that a leaf at `path` may have: all dims; in Adafactor's factors (`optax.FactoredState`) all
    but the largest for `v_row`, and all but the second largest for `v_col`.
    """
    dims = list(range(len(shape)))
    by_size = sorted(dims, key=lambda dim: (shape[dim], dim))
    fields = {part.name for part in path if isinstance(part, jax.tree_util.GetAttrKey)}
    reduced = by_size[-1:] if "v_row" in fields else by_size[-2:-1] if "v_col" in fields else []
    return [dims, [dim for dim in dims if dim not in reduced]]


def _keys(path: tuple) -> tuple[str, ...]:
    """The dict keys of a key path."""
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
