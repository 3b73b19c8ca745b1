"""The description of a user's own module: `model.source: path/to/file.py:build`. docs/models.md has the contract.

In: the function in the file. Out: a `ForeignConfig` that describes the module which it returns. Mask, cache and logical
axes are optional. Without a mask each training row holds one sequence. Without a cache decoding computes all positions
again for each token. Not here: the policy over it (`rl.models.foreign.own_policy`), and its weights
(`rl.models.foreign.own_files`).
Legend: B sequences, T token positions, S cache positions, D model.
"""

import dataclasses
import fnmatch
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import unfreeze

from rewards.importing import import_function
from rl.files.stores import local_copy
from rl.models.config import ForeignConfig, ParameterSpec
from rl.models.files.hf_config import quantization_in
from rl.models.foreign.own_policy import (
    INPUTS,
    LinenModulePolicy,
    NNXModulePolicy,
    OwnModule,
    all_of_it,
    sample_inputs,
)
from rl.models.inputs import Inputs
from rl.models.ops import dtype_of
from rl.models.train_state import string_keys

MODULE_CLASSES = {"nnx": nnx.Module, "linen": flax.linen.Module}


# From a file to a description


class OtherFlavourError(Exception):
    """`source` returned a module of class `found`; its flavours `kinds` do not include the requested one."""

    def __init__(self, source: str, found: str, kinds: list[str]) -> None:
        super().__init__(source, found, kinds)
        self.source, self.found, self.kinds = source, found, kinds


def describe(
    section: Any,
    flavour: str,
    *,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    bos_token_id: int | None,
    pad_token_id: int | None,
) -> ForeignConfig:
    """Builds the module that `section` (the configuration's `model`) names, without numbers, and checks its contract.

    Raises:
      ValueError: the message names model.source, what the module must have, and what it has.
      OtherFlavourError: the module is not of `flavour`.
    """
    source = section.source
    offered = {"vocab_size": vocab_size, "dtype": dtype_of(section.dtype), "param_dtype": dtype_of(section.param_dtype)}
    make = _maker(source, import_function(source, "model.source"), offered, section.args)
    if flavour == "nnx":
        with nnx.use_eager_sharding(False):
            module = nnx.eval_shape(lambda: _of_kind(source, make(nnx.Rngs(0)), flavour))
        graph, weights, rest = nnx.split(module, nnx.Param, ...)
        _require(not rest, source, "hold nothing but nnx.Param", _names(nnx.to_pure_dict(rest)))
        template = nnx.to_pure_dict(weights)
        own = OwnModule(make, graph, template, _inputs(source, module), _extend_inputs(source, module))
        shapes = string_keys(template)
    else:
        module = _of_kind(source, make(nnx.Rngs(0)), flavour)
        own = OwnModule(make, module, {}, _inputs(source, module), _extend_inputs(source, module))
        inputs = sample_inputs(own.inputs)
        variables = jax.eval_shape(lambda: module.init({"params": jax.random.key(0)}, **inputs, method=all_of_it))
        _require(set(variables) == {"params"}, source, "hold the collection params alone", sorted(variables))
        shapes = unfreeze(flax.linen.meta.unbox(variables["params"]))
    config = ForeignConfig(
        kind="own",
        family=type(module).__name__,
        vocab_size=vocab_size,
        hidden_size=0,
        max_position_embeddings=getattr(module, "max_positions", None) or sys.maxsize,
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        pad_token_id=pad_token_id,
        dtype=section.dtype,
        param_dtype=section.param_dtype,
        remat=section.remat,
        specs=_specs(source, shapes, getattr(module, "logical_axes", {})),
        model=own,
        quantization=None if section.weights is None else quantization_in(local_copy(section.weights)),
    )
    policy = NNXModulePolicy(config) if flavour == "nnx" else LinenModulePolicy(config)
    hidden_size, vocab_size = _check_forms(source, policy, shapes)
    return dataclasses.replace(config, hidden_size=hidden_size, vocab_size=vocab_size)


def _maker(source: str, build: Callable[..., Any], offered: Mapping[str, Any], args: Mapping[str, Any]) -> Any:
    """`build` as a function of nnx.Rngs alone. It gets the offered arguments that it names, and all of `args`."""
    parameters = inspect.signature(build).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    unknown = sorted(set(args) - names)
    if unknown and not takes_all:
        raise ValueError(f"model.args must be arguments of {source}, which are {sorted(names)}, got {unknown}")

    def make(rngs: nnx.Rngs) -> Any:
        given = {name: value for name, value in {**offered, "rngs": rngs}.items() if name in names}
        try:
            return build(**{**given, **args})
        except SystemExit as error:
            raise ValueError(f"model.source {source} must return a module, got SystemExit: {error}") from error

    return make


def _of_kind(source: str, module: Any, flavour: str) -> Any:
    kinds = [name for name, base in MODULE_CLASSES.items() if base in type(module).__mro__]
    if kinds != [flavour]:
        raise OtherFlavourError(source, f"{type(module).__module__}.{type(module).__name__}", kinds)
    return module


def _inputs(source: str, module: Any) -> tuple[str, ...]:
    names = tuple(_parameters(type(module).__call__))
    _require(names[:1] == INPUTS[:1] and set(names) <= set(INPUTS), source, f"have __call__{INPUTS}, or less", names)
    _require(hasattr(module, "unembed"), source, "have unembed(hidden)", "none")
    return names


def _extend_inputs(source: str, module: Any) -> tuple[str, ...]:
    has = [hasattr(module, name) for name in ("init_cache", "extend")]
    _require(has[0] == has[1], source, "have both init_cache(num_rows, length) and extend, or neither", has)
    names = tuple(_parameters(type(module).extend)) if has[1] else ()
    known = ("tokens", "positions", "cache")
    rule = f"have extend{known}, or less"
    _require(not names or ({"tokens", "cache"} <= set(names) <= set(known)), source, rule, names)
    return names


def _parameters(method: Any) -> list[str]:
    """Names of the required arguments, without self."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


def _specs(source: str, shapes: Any, logical_axes: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """A `ParameterSpec` for each leaf, with the axes of the first pattern that matches its name."""
    specs: dict[str, Any] = {}
    for name, child in shapes.items():
        path = (*prefix, name)
        if isinstance(child, Mapping):
            specs[name] = _specs(source, child, logical_axes, path)
            continue
        matches = [axes for pattern, axes in logical_axes.items() if fnmatch.fnmatchcase("/".join(path), pattern)]
        axes = tuple(matches[0]) if matches else (None,) * len(child.shape)
        rule = f"give {'/'.join(path)} {list(child.shape)} as many logical_axes as it has dims"
        _require(len(axes) == len(child.shape), source, rule, axes)
        specs[name] = ParameterSpec(tuple(child.shape), axes, _contract_dims(path, len(axes)))
    return specs


def _contract_dims(path: tuple[str, ...], num_dims: int) -> tuple[int, ...]:
    """The dim that a product with this parameter most likely sums over: the inputs of [..., inputs, outputs], or the
    last dim of an embedding table.

    The true dims are not known. Each entry of the other dims gets its own scale, so there are never too few scales.
    """
    if num_dims < 2:
        return ()
    return (num_dims - 1,) if path[-1] == "embedding" else (num_dims - 2,)


def _check_forms(source: str, policy: Any, shapes: Any) -> tuple[int, int]:
    """Checks the form of everything that the module computes. Returns (hidden size, vocabulary)."""
    config, num_rows, length = policy.config, 2, 4
    for name, leaf in _leaves(shapes):
        rule = f"have its weights in model.param_dtype ({config.param_dtype}), which `build` may take as param_dtype"
        _require(leaf.dtype == dtype_of(config.param_dtype), source, rule, f"{name} in {leaf.dtype}")
    labels = jax.ShapeDtypeStruct((num_rows, length), jnp.int32)
    inputs = Inputs(labels, labels, labels, labels)
    hidden = jax.eval_shape(policy.hidden, shapes, inputs)
    form = getattr(hidden, "shape", None)
    _require(form is not None and form[:-1] == labels.shape, source, "return hidden states [B, T, D]", form or hidden)
    rule = f"compute in model.dtype ({config.dtype}), which `build` may take as dtype"
    _require(hidden.dtype == dtype_of(config.dtype), source, rule, f"hidden states in {hidden.dtype}")
    logits = jax.eval_shape(policy.unembed, shapes, hidden)
    form = getattr(logits, "shape", None)
    rule = "return logits [..., V] of hidden states [..., D] from unembed"
    _require(form is not None and form[:-1] == labels.shape, source, rule, form or logits)
    cache = jax.eval_shape(lambda: policy.empty_cache(_zeros(shapes), num_rows, length))
    rows = [leaf.shape[:1] for leaf in jax.tree.leaves(cache)]
    _require(set(rows) <= {(), (num_rows,)}, source, "have the row as first dim of all arrays in init_cache", rows)
    extended = jax.eval_shape(policy.extend, shapes, inputs, cache)
    forms = [[(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)] for tree in ((hidden, cache), extended)]
    rule = f"return (hidden states, cache) from extend, of the forms {forms[0]}"
    _require(jax.tree.structure((hidden, cache)) == jax.tree.structure(extended), source, rule, extended)
    _require(forms[0] == forms[1], source, rule, forms[1])
    return hidden.shape[-1], logits.shape[-1]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(str(part.key) for part in path), leaf


def _names(tree: Any) -> list[str]:
    return [name for name, _ in _leaves(tree)]


def _require(holds: bool, source: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"model.source {source}: the module must {rule}, got {got}; see docs/models.md")


# Weights in a file, by name
