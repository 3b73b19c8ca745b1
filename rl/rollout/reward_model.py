"""Reward models: sequence-classification folders whose one score is the reward, computed by the toolkit's own decoder.

In: entries of `rewards.functions` such as `model:FOLDER`, and the run's mesh; then prompts with completions. Out: a
score for each. Each model has its own tokenizer and chat template: prompt and completion are written and tokenised
again by those, from text. It lies on the run's mesh by the run's rules, and computes in the type of its folder, the
score in float32. Sequences are packed into rows, `rewards.model_tokens` tokens a call. Not here: reading folders
(`rl.models.files.reward_model`).
Legend: R rows, T token positions, D model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rewards.replies import Failure
from rl.config.load import Config
from rl.config.sections import reward_models
from rl.data.tokenizer import load_tokenizer
from rl.devices import hosts
from rl.devices.mesh import num_row_shards, replicated, row_sharding, shard_bytes
from rl.devices.programs import Program, Programs
from rl.models.files.folders import put_shards
from rl.models.files.hf import resolve_source
from rl.models.files.reward_model import load_reward_params, read_reward_config
from rl.models.flavours import policy_from_config
from rl.models.inputs import Inputs
from rl.models.policy import Params
from rl.sampler.prompt_logprobs import packed_calls
from rl.state.states import InitStateFn, get_abstract_state


class RewardModel:
    """A reward model of a run, a function for `rewards.in_process`. Its weights are read at the first call.

    `weight_bytes` are those that its weights then take on a device, and `tokenizer` is its own.

    Args:
      source: a folder or hub id.

    Raises:
      ValueError: see `rl.models.files.reward_model.read_reward_config`; there is no tokenizer, or it has ids beyond the
        model's vocabulary.
    """

    def __init__(self, config: Config, source: str, mesh: Mesh) -> None:
        self._folder, self._mesh = resolve_source(source, what="the model"), mesh
        self._model_config = model_config = read_reward_config(self._folder)
        self.tokenizer = load_tokenizer(source, key="rewards.functions.*.function")
        if self.tokenizer.vocab_size > model_config.vocab_size:
            raise ValueError(
                f"a reward model's vocabulary must hold every id of its tokenizer, got {model_config.vocab_size} "
                f"entries for a tokenizer of {self.tokenizer.vocab_size} in {source!r}; check the folder's files"
            )
        self._allow_nonfinite, self._tokens_per_call = config.model.allow_nonfinite, config.rewards.model_tokens
        self._policy = policy_from_config(config, model_config, mesh)
        init_state_fn = InitStateFn(self._policy, None, config.seed)
        abstract = get_abstract_state(config, mesh, init_state_fn, is_training=False)
        self._shardings = abstract.shardings.params
        self.weight_bytes = shard_bytes(abstract.shapes.params, self._shardings)  # on one device
        self._rows, self._num_shards = row_sharding(mesh, config.mesh.rules), num_row_shards(mesh, config.mesh.rules)
        self._programs = Programs()
        self._weights: tuple[Params, jax.Array] | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | Failure]:
        """The score of each completion of its prompt, or why it has none: it is longer than the model's positions, or
        cannot be written.
        """
        ids: dict[int, list[int]] = {}
        results: list[float | Failure] = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            found = self._read(prompt, completion)
            results.append(found if isinstance(found, tuple) else 0.0)
            if not isinstance(found, tuple):
                ids[number] = found
        for number, score in zip(ids, self.scores(list(ids.values())), strict=True):
            results[number] = score
        return results

    def token_ids(self, prompt: Any, completion: Any) -> list[int]:
        """What the model reads: a chat by its chat template, with the completion as the last message; text as prompt
        and completion in one, with the tokenizer's own beginning of raw text.

        Raises:
          ValueError: there is no chat template, or it does not take the messages; the text is not valid Unicode.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt + completion)
        return self.tokenizer.encode_answered([*prompt, *completion])

    def scores(self, token_ids: Sequence[Sequence[int]]) -> list[float]:
        """The score of each sequence of token ids, at least one each: the head's product with the hidden state of the
        last token, as in `GenericForSequenceClassification` of transformers
        (https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_layers.py). The last token is
        the last one that is not `pad_token_id` of config.json; the first one where all are.
        """
        if not token_ids:
            return []
        params, score_D = self._load()
        read = [ids[: self._last(ids) + 1] for ids in token_ids]  # what follows changes nothing
        results: dict[int, float] = {}
        for inputs, places in packed_calls(read, self._tokens_per_call, self._num_shards, self._policy.packs_rows):
            shape = inputs.tokens_BT.shape
            program = self._programs.get(shape, lambda shape=shape: self._compile(shape))
            placed = hosts.put(inputs, Inputs(*(self._rows,) * 4))
            scores_RT = np.asarray(program(params, score_D, placed))  # the same in every process
            for number, row, span in places:
                results[number] = float(scores_RT[row, span.stop - 1])
        return [results[number] for number in range(len(read))]

    def _read(self, prompt: Any, completion: Any) -> list[int] | Failure:
        try:
            ids = self.token_ids(prompt, completion)
        except ValueError as error:
            return "exception", str(error)
        most = self._model_config.max_position_embeddings
        if not 0 < len(ids) <= most:
            return "exception", f"the reward model takes 1 to {most} tokens (its positions), got {len(ids)}"
        return ids

    def _last(self, ids: Sequence[int]) -> int:
        """The position of the token whose hidden state is scored."""
        pad_id = self._model_config.pad_token_id
        return next((place for place in reversed(range(len(ids))) if ids[place] != pad_id), 0)

    def _load(self) -> tuple[Params, jax.Array]:
        if self._weights is None:
            params, score_D = load_reward_params(
                self._folder, self._model_config, self._shardings, self._allow_nonfinite
            )
            self._weights = params, put_shards(score_D, replicated(self._mesh))
        return self._weights

    def _compile(self, shape: tuple[int, int]) -> Callable[..., jax.Array]:
        policy, everywhere = self._policy, replicated(self._mesh)

        def of_rows(params: Params, score_D: jax.Array, inputs: Inputs) -> jax.Array:
            hidden_RTD = policy.hidden(params, inputs).astype(score_D.dtype)
            return jnp.einsum("rtd,d->rt", hidden_RTD, score_D, precision=jax.lax.Precision.HIGHEST)

        params, score_D = self._load()
        inputs = Inputs(*(jax.ShapeDtypeStruct(shape, jnp.int32),) * 4)
        shardings = (self._shardings, everywhere, Inputs(*(self._rows,) * 4))
        return Program(of_rows, shardings, everywhere).prepare((params, score_D, inputs))


def open_reward_models(config: Config, mesh: Mesh | None) -> dict[str, RewardModel]:
    """The reward models of a run by the name of their function; nothing is read but headers and tokenizers.

    Raises:
      ValueError: as `RewardModel`, naming the entry.
    """
    models = {}
    for name, source in reward_models(config).items():
        assert mesh is not None, "a reward model without a mesh"
        try:
            models[name] = RewardModel(config, source, mesh)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
    return models


def weight_bytes(models: Mapping[str, RewardModel]) -> int:
    """Bytes on a device of the weights of reward models, once they are read."""
    return sum(model.weight_bytes for model in models.values())


def check_prompts(models: Mapping[str, RewardModel], prompts: Sequence[Any]) -> None:
    """ValueError, naming the function, where a reward model's chat template does not take one of these prompts with an
    answer.
    """
    for name, model in models.items():
        for prompt in prompts:
            try:
                model.token_ids(prompt, "a" if isinstance(prompt, str) else [{"role": "assistant", "content": "a"}])
            except ValueError as error:
                raise ValueError(
                    f"reward {name!r}: {error}; give a reward model whose tokenizer has a template for such chats, or "
                    "set data.chat=false"
                ) from error
