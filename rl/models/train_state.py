"""The two flavours of a training state, and the one pure pytree that both become.

`TrainState` (Linen) and `TrainStateNNX` (an `nnx.Module` with the model and an `nnx.Optimizer`) are what
`init_state_fn` returns. `pure()` turns either into a `PureState`, which the train step, the sampler and the checkpoints
see; `PureState`s of the two flavours have the same tree, dtypes and values, so nothing after this module knows the
flavour.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

from rl.models.lora import split


class PureState(NamedTuple):
    """The state of a training run as a plain pytree.

    Attributes:
      step: int32 [], the position of the run: its updates so far, skipped ones included. The optimizer's own counts,
        which schedules use, leave skipped updates out.
      params: nested dict of weights, with adapters beside their kernels where the model has any.
      opt_state: the optax state over `params`, or over the adapters where there are any; () when there is no optimizer.
      rng: uint32 key data of the run's base key; every random number of the run is derived from it and the step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


class TrainState(train_state.TrainState):
    """The Linen state: flax's own, plus the base key. `tx` is None and `opt_state` is () for a state that is not
    trained.
    """

    rng: jax.Array

    @classmethod
    def build(cls, policy: Any, params: Any, tx: optax.GradientTransformation | None, rng: jax.Array) -> "TrainState":
        """A state at step 0 around `params`."""
        opt_state = () if tx is None else tx.init(split(policy.config, params)[0])
        return cls(
            step=jnp.zeros((), jnp.int32),
            apply_fn=policy.module.apply,
            params=params,
            tx=tx,  # pyright: ignore[reportArgumentType]
            opt_state=opt_state,
            rng=rng,
        )

    def pure(self) -> PureState:
        """The same state as a plain pytree."""
        return PureState(jnp.asarray(self.step, jnp.int32), self.params, self.opt_state, self.rng)


class RngData(nnx.Variable):
    """Key data of the run's base key."""


class TrainStateNNX(nnx.Module):
    """The NNX state: model, `nnx.Optimizer` (None for a state that is not trained) and base key."""

    def __init__(self, model: nnx.Module, optimizer: nnx.Optimizer | None, rng: jax.Array):
        self.model = model
        self.optimizer = optimizer
        self.rng = RngData(rng)

    @classmethod
    def build(
        cls, policy: Any, params: Any, tx: optax.GradientTransformation | None, rng: jax.Array
    ) -> "TrainStateNNX":
        """A state at step 0 around a model that holds `params`."""
        model = policy.model(params)
        wrt = nnx.Param if policy.config.lora is None else nnx.LoRAParam
        return cls(model, None if tx is None else nnx.Optimizer(model, tx, wrt=wrt), rng)

    def pure(self) -> PureState:
        """The same state as a plain pytree: nested dicts, and the optax state as `tx.init` builds it over nested
        dicts.
        """
        params = string_keys(nnx.to_pure_dict(nnx.state(self.model, nnx.Param)))
        if self.optimizer is None:
            return PureState(jnp.zeros((), jnp.int32), params, (), self.rng[...])
        trained = string_keys(nnx.to_pure_dict(nnx.state(self.model, self.optimizer.wrt)))
        template = jax.eval_shape(self.optimizer.tx.init, trained)
        opt_state = _refill(template, self.optimizer.opt_state)
        return PureState(self.optimizer.step[...].astype(jnp.int32), params, opt_state, self.rng[...])


def string_keys(tree: Any) -> Any:
    """Nested dicts with strings as keys, because NNX numbers the entries of a list."""
    return {str(key): string_keys(child) for key, child in tree.items()} if isinstance(tree, dict) else tree


def _refill(template: Any, variables: Any) -> Any:
    """`template` with the arrays of `variables` at the same paths; NNX wraps each array in a Variable."""
    arrays = {_names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.as_pure(variables))[0]}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    assert len(arrays) == len(leaves), (len(arrays), len(leaves))
    return jax.tree_util.tree_unflatten(treedef, [arrays[_names(path)] for path, _ in leaves])


def _names(path: tuple) -> tuple[str, ...]:
    """A key path as strings, so that paths in a State, a dict and a NamedTuple compare as equal."""
    return tuple(str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path)


def pure_state(state: Any) -> PureState:
    """The pure pytree of a `TrainState` or `TrainStateNNX`; a `PureState` is returned unchanged."""
    return state if isinstance(state, PureState) else state.pure()
