"""The origin of a run: tokenizer, model shape and pretrained weights, from the `model` and `tokenizer` sections."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from rl.config.load import Config
from rl.config.sections import TUNIX_PREFIX, reward_models, source_kind
from rl.data.tokenizer import BYTE_SOURCE, Tokenizer, load_tokenizer
from rl.files.local_files import file_hash
from rl.files.stores import local_copy
from rl.models.config import LoRAConfig, ModelConfig
from rl.models.files import hf
from rl.models.files.hf import read_config, resolve_source
from rl.models.files.peft import adapter_for, adapter_hash, check_adapter, load_adapter
from rl.models.flavours import foreign_config
from rl.models.foreign import files as foreign
from rl.models.lora import join
from rl.run_folder.clock import run_clock
from rl.state import param_folder


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model from which a run starts.

    Attributes:
      model_config: shape, dtypes, and adapters if the run trains any.
      folder: local Hugging Face folder or parameter-only checkpoint with the weights of the base alone, or the path in
        model.weights; None for a fresh random model.
      identity: JSON-able source and content hash, equal for equal weights. `run.json` keeps it for policy and
        reference.
      adapter: folder of the adapter from which training starts; None for a fresh adapter, or no adapters.
      allow_nonfinite: whether the files may hold NaN and infinity.
      clock: the time that the chat template is told; None where it asks for none.
      messages: what the start is to say of the model: weights that are not read, and which rotary table the run has.
    """

    model_config: ModelConfig
    folder: pathlib.Path | None
    identity: dict[str, Any]
    adapter: pathlib.Path | None = None
    allow_nonfinite: bool = False
    clock: str | None = None
    messages: tuple[str, ...] = ()


def tokenizer_from_config(config: Config) -> Tokenizer:
    """The tokenizer of tokenizer.source, else of the model's folder, else the byte tokenizer. Its chat template is told
    the time at which the run began.
    """
    source, key = config.tokenizer.source, "tokenizer.source"
    if source is None and (source := folder_source(config)) is not None:
        key = "model.source"
    template, variables = config.tokenizer.chat_template, config.data.chat_template_kwargs
    tokenizer = load_tokenizer(source or BYTE_SOURCE, template, variables, key)
    return tokenizer.with_clock(run_clock(config)) if tokenizer.asks_the_time else tokenizer


def folder_source(config: Config) -> str | None:
    """The folder or hub id in model.source; None for a fresh model and for a user's module."""
    source = config.model.source
    return None if source is None or source_kind(source) == "own" else source.removeprefix(TUNIX_PREFIX)


def find_origin(config: Config, tokenizer: Tokenizer) -> Origin:
    """Reads the model's configuration, checks the headers of its weights and hashes them. Loads no weights.

    Raises:
      ValueError: there is no such model, its architecture is not supported, weights are missing or damaged, or the
        tokenizer has ids beyond the model's vocabulary.
    """
    origin = _origin(config, tokenizer)
    return dataclasses.replace(origin, allow_nonfinite=config.model.allow_nonfinite, clock=tokenizer.clock)


def _origin(config: Config, tokenizer: Tokenizer) -> Origin:
    if source_kind(config.model.source) != "decoder":
        return _foreign_origin(config, tokenizer)
    folder = None if config.model.source is None else pathlib.Path(resolve_source(config.model.source))
    model_config = model_shape(config, tokenizer, folder)
    messages = rope_messages(model_config)
    if folder is None:
        identity: dict[str, Any] = {"source": None, "seed": config.seed}
    else:
        files = _files_of(folder)
        locations = files.check_weights(folder, model_config)
        messages += hf.skipped_messages(folder, locations)
        identity = {"source": config.model.source, "hash": files.weights_hash(folder)}
    if config.lora.adapter is None:
        return Origin(model_config, folder, identity, messages=tuple(messages))
    adapter = local_copy(config.lora.adapter)
    check_adapter(adapter, model_config)
    identity |= {"adapter": config.lora.adapter, "adapter_hash": adapter_hash(adapter)}
    return Origin(model_config, folder, identity, adapter, messages=tuple(messages))


def rope_messages(model_config: ModelConfig) -> list[str]:
    """Which rotary table a run has, where it depends on the run's length."""
    scaling = model_config.rope_scaling
    if scaling.kind != "longrope" or scaling.longest is None:
        return []
    name, sign = ("long", ">") if scaling.is_long else ("short", "<=")
    original = f"{scaling.original_max_position_embeddings} (original_max_position_embeddings)"
    message = f"rotary positions: the {name} table of longrope in the whole run, because prompt and completion may have"
    return [f"{message} {scaling.longest} tokens, {sign} {original}"]


def reward_model_identity(
    config: Config, tokenizers: Mapping[str, Tokenizer] | None = None
) -> dict[str, dict[str, Any]]:
    """Source and hashes of weights and tokenizer of the run's reward models, by name; empty without one. They are part
    of the run's identity. tokenizers: by name, where they are read already.
    """
    models = {
        name: {
            "source": source,
            "hash": hf.weights_hash(resolve_source(source)),
            "tokenizer": (load_tokenizer(source) if tokenizers is None else tokenizers[name]).content_hash(),
        }
        for name, source in reward_models(config).items()
    }
    return {"reward_models": models} if models else {}


def model_shape(config: Config, tokenizer: Tokenizer, folder: pathlib.Path | None) -> ModelConfig:
    """The model of a run, from `model.arch`, the config.json in `folder`, or the function in model.source. Reads no
    weights.

    Raises:
      ValueError: the architecture is not supported, a module breaks its contract, or the tokenizer has ids beyond the
        model's vocabulary.
    """
    section, arch = config.model, config.model.arch
    if source_kind(section.source) != "decoder":
        foreign_shape: Any = foreign_config(
            config,
            folder,
            vocab_size=tokenizer.vocab_size,
            eos_token_ids=tokenizer.eos_ids,
            bos_token_id=tokenizer.bos_id,
            pad_token_id=tokenizer.pad_id,
        )
        _check_vocabulary(tokenizer, foreign_shape)
        return foreign_shape
    if folder is None:
        shape = {name: value for name, value in dataclasses.asdict(arch).items() if name != "vocab_size"}  # pyright: ignore[reportArgumentType]
        model_config = ModelConfig.from_arch(
            **shape,
            vocab_size=arch.vocab_size or tokenizer.vocab_size,
            eos_token_ids=tokenizer.eos_ids,
            bos_token_id=tokenizer.bos_id,
            pad_token_id=tokenizer.pad_id,
        )
    else:
        model_config = read_config(folder)
    model_config = model_config.for_length(config.data.max_prompt_length + config.longest_completion)
    _check_vocabulary(tokenizer, model_config)
    model_config = dataclasses.replace(
        model_config,
        dtype=section.dtype,
        param_dtype=section.param_dtype,
        remat=section.remat,
        scan_layers=section.scan_layers,
    )
    return dataclasses.replace(model_config, lora=_lora(config, model_config))


def _files_of(folder: pathlib.Path) -> Any:
    """The module that reads a folder's weights; both have `check_weights`, `weights_hash` and `load_params`."""
    return param_folder if param_folder.is_param_folder(folder) else hf


def _foreign_origin(config: Config, tokenizer: Tokenizer) -> Origin:
    """The origin of a model that is not the toolkit's own decoder: a user's module, or a Tunix model."""
    section, source = config.model, folder_source(config)
    folder = None if source is None else pathlib.Path(resolve_source(source))
    model_config = model_shape(config, tokenizer, folder)
    identity: dict[str, Any] = {"source": section.source}
    if folder is not None:
        foreign.check_weights(folder, model_config)
        return Origin(model_config, folder, {**identity, "hash": hf.weights_hash(folder)})
    file = pathlib.Path(str(section.source).rpartition(":")[0]).expanduser()
    identity |= {"file": hashlib.sha256(file.read_bytes()).hexdigest(), "args": section.args}
    if section.weights is None:
        return Origin(model_config, None, {**identity, "seed": config.seed})
    weights = local_copy(section.weights)
    if model_config.quantization is not None:
        foreign.check_weights(weights, model_config)
        return Origin(model_config, weights, {**identity, "hash": hf.weights_hash(weights)})
    if not weights.is_file():
        raise ValueError(
            f"model.weights must be a safetensors file, or a folder of grpo quantize, got {section.weights!r}; check "
            "the path"
        )
    return Origin(model_config, weights, {**identity, "hash": file_hash(weights)})


def _check_vocabulary(tokenizer: Tokenizer, model_config: Any) -> None:
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"the model's vocabulary must hold every token id, got {model_config.vocab_size} entries for a tokenizer "
            f"of {tokenizer.vocab_size}; set tokenizer.source to the model's own tokenizer"
        )


def _lora(config: Config, model_config: ModelConfig) -> LoRAConfig | None:
    """The adapters of a run: from the configuration, or with rank 0 from the adapter to start from."""
    section = config.lora
    if section.rank:
        found = LoRAConfig(section.rank, section.alpha, tuple(section.targets), section.rank_stabilized)
    elif section.adapter is not None:
        found = adapter_for(local_copy(section.adapter), model_config)
    else:
        return None
    return dataclasses.replace(found, base_dtype=section.base_dtype, base_group_size=section.base_group_size)


def pretrained_params(origin: Origin, shardings: Any) -> Any | None:
    """The weights of the folder, placed by `shardings`; a new copy on every call. None for a fresh random model.

    With adapters they are the base alone, or base and adapter where one is given to start from.
    """
    if origin.folder is None:
        return None
    options = (origin.model_config, shardings, origin.allow_nonfinite)
    if origin.model_config.kind != "decoder":
        return foreign.load_weights(origin.folder, *options)
    base = _files_of(origin.folder).load_params(origin.folder, *options)
    return base if origin.adapter is None else join(load_adapter(origin.adapter, *options), base)
