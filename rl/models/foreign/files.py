"""What a run does differently for a model that is not the toolkit's own decoder: weights in and out, remarks at the
start, and a trial of the computation.

In: a policy (`rl.models.foreign.own_policy`, `rl.models.foreign.tunix_policy`). `notes`, `unsharded` and `check_policy`
take any policy, and have nothing to say about the toolkit's own decoder. Not here: contract and computation of the
policy.
Legend: B rows, T token positions, D model.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.config import flatten_specs
from rl.models.files import quantized_files
from rl.models.files.folders import new_folder
from rl.models.foreign import own_files
from rl.models.inputs import Inputs, plain_inputs
from rl.models.ops import dtype_of
from rl.models.policy import Params, Policy, WavePolicy

LENGTH = 6  # tokens of the trial
TOLERANCES = {"float64": 1e-8, "float32": 1e-3, "bfloat16": 0.2}  # relative to the largest hidden state


def check_weights(folder: pathlib.Path, config: Any) -> None:
    """Compares the headers of a Tunix model's files, or of quantised files, with `config`. ValueError names what does
    not fit.
    """
    if config.quantization is not None:
        quantized_files.check_weights(folder, config)
        return
    from rl.models.foreign import tunix_config

    tunix_config.check_files(folder, config)


class ModelFiles(Protocol):
    """A module that reads and writes the files of one kind of model."""

    COMES_IN_A_FOLDER: bool  # with configuration and tokenizer

    def load_weights(self, path: pathlib.Path, config: Any, shardings: Any, allow_nonfinite: bool, /) -> Params: ...
    def weight_reader(self, path: pathlib.Path, config: Any, /) -> Callable[[tuple[str, ...]], np.ndarray]: ...
    def write_folder(self, folder: pathlib.Path, config: Any, params: Params, tokenizer: Any, /) -> None: ...
    def with_weights(self, folder: pathlib.Path, /) -> dict[str, str]: ...


def files_of(config: Any) -> ModelFiles:
    """What reads and writes the files of a `ForeignConfig`'s kind."""
    return _FILES[config.kind]()


def _tunix_files() -> ModelFiles:
    from rl.models.foreign import tunix_files  # only where it is asked for: it imports tunix

    return tunix_files


_FILES: dict[str, Callable[[], ModelFiles]] = {"own": lambda: own_files, "tunix": _tunix_files}


def load_weights(path: pathlib.Path, config: Any, shardings: Any, allow_nonfinite: bool = False) -> Params:
    """The weights of a `ForeignConfig`'s model, placed by `shardings`.

    Args:
      path: a Tunix model's folder, or the value of model.weights.

    Raises:
      ValueError: weights that are missing, extra or misshapen, naming each; NaN or infinity, unless `allow_nonfinite`.
    """
    if config.quantization is not None:
        return quantized_files.load_params(path, config, shardings, allow_nonfinite)
    return files_of(config).load_weights(path, config, shardings, allow_nonfinite)


def weight_reader(path: pathlib.Path, config: Any) -> Callable[[tuple[str, ...]], np.ndarray]:
    """A function that reads one parameter of the model, plain and in its stored type; the rest stays on the disk."""
    return files_of(config).weight_reader(path, config)


def save_folder(out: str | pathlib.Path, config: Any, params: Params, tokenizer: Any, dtype: str | None = None) -> None:
    """Writes the folder `out`, which must be new or empty.

    For a Tunix model it is a Hugging Face folder like the one that the model came from. For a user's module it is a
    model.safetensors with every parameter under its name, which model.weights takes. `dtype` is the stored type; None
    keeps `config.param_dtype`.
    """
    if dtype is not None:
        config = dataclasses.replace(config, param_dtype=dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype_of(dtype)), params)
    with new_folder(out) as folder:
        files_of(config).write_folder(folder, config, params, tokenizer)


def notes(policy: Policy) -> Iterator[str]:
    """Remarks for the start of a run about how the policy is computed."""
    if policy.decodes_in_waves:
        yield (
            "the policy decodes in aligned waves with a cache of its own: every sample holds its own copy of the "
            "prompt, and a wave lasts as long as its longest completion"
        )
    if not policy.packs_rows:
        yield "the policy cannot tell the sequences of a row apart: each training row holds one prompt and completion"


def unsharded(policy: Policy, num_devices: int) -> str | None:
    """A warning about matrices without a logical axis, which every device holds whole; None when there is none."""
    matrices = [(path, spec) for path, spec in flatten_specs(policy.config.specs) if len(spec.shape) > 1]
    bare = ["/".join(path) for path, spec in matrices if not any(spec.axes)]
    if num_devices == 1 or not bare:
        return None
    shown = ", ".join(bare[:4]) + (f" and {len(bare) - 4} more" if len(bare) > 4 else "")
    return (
        f"{len(bare)} of {len(matrices)} matrices have no logical axes, so that each of {num_devices} devices holds "
        f"them and their moments whole: {shown}; give the module `logical_axes` (docs/models.md)"
    )


def check_policy(policy: Policy, params: Params, source: str | None) -> None:
    """Tries a policy with a cache of its own on a few tokens.

    Raises:
      ValueError: a hidden state depends on later tokens; decoding does not give the hidden states of the whole
        sequence; sequences of one row see each other.
    """
    if not policy.decodes_in_waves:
        return
    policy = cast(WavePolicy, policy)
    inputs = plain_inputs((7 * np.arange(LENGTH, dtype=np.int32) % policy.config.vocab_size)[None])
    largest, errors = jax.jit(lambda *args: _trial(policy, *args))(params, inputs)
    scale = max(float(largest), 1e-6)
    rules = {
        "causal": "a hidden state must not depend on later tokens",
        "decoding": "`extend` must give the hidden states that the whole sequence gives",
        "packing": "`attention_mask` must keep the sequences of a row apart (or leave that argument out)",
    }
    for name, error in errors.items():
        relative = float(error) / scale
        if not relative <= TOLERANCES[policy.config.dtype]:
            raise ValueError(
                f"model.source {source}: {rules[name]}, got a difference of {relative:.2g} times the largest hidden "
                f"state on {LENGTH} tokens; see docs/models.md"
            )


def _trial(policy: WavePolicy, params: Params, inputs: Inputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(the largest hidden state of a sequence, {rule: largest difference}) of trials of causality, decoding and
    packing.
    """

    def difference(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(a - b))

    half = LENGTH // 2
    tokens_1T, positions_1T, zeros_1T, _ = inputs
    whole_1TD = policy.hidden(params, inputs)
    other_1T = tokens_1T.at[:, half:].set(tokens_1T[:, :1])
    other_1TD = policy.hidden(params, inputs._replace(tokens_BT=other_1T))
    errors = {"causal": difference(whole_1TD[:, :half], other_1TD[:, :half])}
    cache, parts = policy.empty_cache(params, 1, LENGTH + 1), []
    for start, stop in ((0, half), *((t, t + 1) for t in range(half, LENGTH))):
        part_1TD, cache = policy.extend(params, Inputs(*(x[:, start:stop] for x in inputs)), cache)
        parts.append(part_1TD)
    errors["decoding"] = difference(whole_1TD, jnp.concatenate(parts, axis=1))
    if policy.packs_rows:
        # The sequence, the sequence again as another group, and its second half as another branch of the first group.
        tokens, positions = (jnp.concatenate([x, x, x[:, half:]], axis=1) for x in (tokens_1T, positions_1T))
        groups_1T = jnp.concatenate([zeros_1T, zeros_1T + 1, zeros_1T[:, half:]], axis=1)
        branches_1T = jnp.concatenate([(positions_1T >= half) * 1, zeros_1T, zeros_1T[:, half:] + 2], axis=1)
        packed_1TD = policy.hidden(params, Inputs(tokens, positions, groups_1T, branches_1T))
        expected_1TD = jnp.concatenate([whole_1TD, whole_1TD, whole_1TD[:, half:]], axis=1)
        errors["packing"] = difference(packed_1TD, expected_1TD)
    return jnp.max(jnp.abs(whole_1TD)), errors
