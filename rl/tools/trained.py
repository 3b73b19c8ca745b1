"""A policy with weights for evaluation, sampling and export.

In: a run folder, Hugging Face folder, hub id or recipe. Out: weights on a mesh.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from rl.config.load import Config, load_config
from rl.config.ranges import check_possible_path
from rl.data.tokenizer import Tokenizer, download_tokenizer
from rl.devices import hosts
from rl.devices.mesh import create_mesh
from rl.files.stores import check_path, is_remote
from rl.models.flavours import policy_from_config
from rl.models.policy import Policy
from rl.run.heartbeat import heartbeat
from rl.run_folder.contents import Step, chosen_step
from rl.run_folder.folder import check_trust, checkpoint_folder, checkpoint_steps, is_run_folder, read_run
from rl.run_folder.remote_steps import local_source
from rl.run_folder.trust import TO_SAMPLE
from rl.state.checkpoint import create_checkpoint_manager
from rl.state.checkpoint_files import damaged_files
from rl.state.optimizer import create_training_optimizer, shortest_run
from rl.state.origin import Origin, find_origin, folder_source, pretrained_params, tokenizer_from_config
from rl.state.states import InitStateFn, frozen_base, get_abstract_state, setup_decode_state

_OF_MODEL = ("model", "lora", "tokenizer")  # sections of a configuration that say what a model is


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """A policy with weights.

    Attributes:
      params, shardings: the weights and their shardings, trees of the same structure.
      rng: uint32 key data of the run's base key, see `rl.models.train_state.PureState`.
      step: the step of their checkpoint; None for weights of model.source.
    """

    policy: Policy
    params: Any
    shardings: Any
    mesh: Mesh
    tokenizer: Tokenizer
    origin: Origin
    rng: Any
    step: int | None


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """The origin of weights: the configuration, the run folder (None: model.source), and the step of its checkpoint
    (None: the newest whole one).
    """

    config: Config
    run: pathlib.Path | None
    step: int | None


def resolve_model(
    model: str | os.PathLike,
    overrides: Sequence[str],
    step: Step | None = None,
    adapter: str | None = None,
    alone: bool = True,
    trust: bool = False,
) -> WeightSource:
    """The origin of weights that MODEL names. Loads no weights, and ignores the processes with which a run was made.

    For a command of one process this checks whether code in a run folder may run. With several processes the caller
    checks it when all have joined (`rl.run_folder.folder.check_trust`).

    Args:
      model: a run folder, a YAML recipe, a Hugging Face folder or a hub id.
      step: the step of a run's checkpoint, or "best"; None: the newest.
      adapter: folder of an adapter in PEFT's format, to put beside the weights of model.source.
      alone: whether the command runs in one process, which runs code of the model but no rewards.
      trust: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: `model` is none of these; there is no such checkpoint; a step is given without a run, or an adapter
        with one; an override is wrong; keys name processes for a command of one process; or a run folder names code
        that is not shown to be the user's.
    """
    source = _resolve(model, overrides, step, adapter)
    if alone:
        hosts.check_alone(source.config.distributed)
        check_trust(source.run or model, source.config, overrides, TO_SAMPLE, trust)
    return source


def _resolve(
    model: str | os.PathLike, overrides: Sequence[str], step: Step | None, adapter: str | None
) -> WeightSource:
    check_possible_path("MODEL", str(model))
    if str(model).endswith((".yml", ".yaml")):
        check_path(str(model), "a recipe", may_be_remote=False)
    path = local_source(model, step)
    if is_run_folder(path):
        if adapter is not None:
            raise ValueError(
                f"--adapter needs a Hugging Face folder, a hub id or a recipe, got the run {str(model)!r}, which has "
                "weights of its own; name its base, or leave --adapter out"
            )
        config = load_config(path / "config.yml", [*(f"distributed.{name}=null" for name in hosts.NAMES), *overrides])
        steps = checkpoint_steps(path)
        if not steps:
            raise ValueError(
                f"run folder {str(model)!r} must hold a checkpoint, and it has none; let it reach checkpoint.every"
            )
        number = chosen_step(path, step)
        if number is not None and number not in steps:
            raise ValueError(f"--step must be one of the checkpoints of {str(model)!r}, {steps}, got {number}")
        return WeightSource(config, path, number)
    if step is not None:
        raise ValueError(f"--step needs a run folder, got {str(model)!r}")
    if adapter is not None:
        overrides = [*overrides, f"lora.adapter={json.dumps(adapter)}"]
    if path.suffix in (".yml", ".yaml"):
        return WeightSource(load_config(path, overrides), None, None)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise ValueError(
            f"MODEL must be a run folder (run.json), a Hugging Face folder (config.json), a hub id or a YAML recipe, "
            f"got {str(model)!r}"
        )
    source = str(path) if path.is_dir() and not is_remote(model) else str(model)
    config = load_config(None, [f"model.source={json.dumps(source)}", *overrides])
    named = folder_source(config)
    if config.model.source == source and named is not None and not (is_remote(named) or pathlib.Path(named).is_dir()):
        download_tokenizer(named, "MODEL")  # so that what is no model is named as it was given
    return WeightSource(config, None, None)


def resolve_for(
    model: str | os.PathLike,
    recipe: str | os.PathLike,
    overrides: Sequence[str],
    step: Step | None = None,
    adapter: str | None = None,
) -> tuple[WeightSource, Config]:
    """The weights of MODEL, and a recipe that is to be done with them. Loads nothing, and leaves the checks of code to
    the caller.

    What MODEL says itself (`model`, `lora` and `tokenizer` of a run or of another recipe; the source of a Hugging Face
    folder) takes the place of what the recipe says. Overrides win over both.

    Args:
      step, adapter: see `resolve_model`.

    Returns:
      The source, whose configuration has the seed of its weights, and the configuration of the recipe.

    Raises:
      ValueError: as in `resolve_model`, or the recipe is none.
    """
    check_path(str(recipe), "CONFIG", may_be_remote=False)
    if pathlib.Path(recipe).suffix not in (".yml", ".yaml"):
        raise ValueError(f"CONFIG must be a YAML recipe, got {str(recipe)!r}; of a run folder, name its config.yml")
    of_model = [text for text in overrides if text.partition(".")[0].partition("=")[0] in _OF_MODEL]
    source = resolve_model(model, of_model, step, adapter, alone=False)
    if source.run is None and not str(model).endswith((".yml", ".yaml")):
        given = [f"model.source={json.dumps(source.config.model.source)}"]
        given += [] if adapter is None else [f"lora.adapter={json.dumps(adapter)}"]
        config = load_config(recipe, [*given, *overrides])
        return WeightSource(config, None, None), config
    parts = {name: getattr(source.config, name) for name in _OF_MODEL}
    config = dataclasses.replace(load_config(recipe, overrides), **parts)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(source, config=dataclasses.replace(config, seed=source.config.seed)), config  # pyright: ignore[reportArgumentType]


def with_step(source: WeightSource, warn: Callable[[str], None]) -> WeightSource:
    """The source with the step of its newest whole checkpoint, which an output file records before the weights are
    loaded. `warn` gets a line about each damaged one. ValueError where none is whole.
    """
    if source.run is None or source.step is not None:
        return source
    steps = checkpoint_steps(source.run)
    if not source.config.checkpoint.verify:
        return dataclasses.replace(source, step=steps[-1])
    for step in reversed(steps):
        problems = damaged_files(checkpoint_folder(source.run, step))
        if not problems:
            return dataclasses.replace(source, step=step)
        warn(f"warning: checkpoint {step} is DAMAGED and is not used: {'; '.join(problems[:3])}")
    raise ValueError(f"{source.run} must hold a checkpoint that is whole, and of steps {steps} none is")


def load_source(source: WeightSource) -> TrainedPolicy:
    """The weights of a `WeightSource`. A line on stderr says from time to time that they are being read."""
    with heartbeat(_say, "reading the weights"):
        if source.run is None:
            return load_start(source.config)
        return load_checkpoint(source.config, source.run, source.step)


def _say(text: str) -> None:
    if hosts.is_first():
        print(text, file=sys.stderr, flush=True)


def load_start(config: Config) -> TrainedPolicy:
    """The weights that a run with this configuration would start from."""
    tokenizer, origin, mesh, init_state_fn = _decode_setup(config)
    shardings = get_abstract_state(config, mesh, init_state_fn, is_training=False).shardings.params
    state, _ = setup_decode_state(config, mesh, init_state_fn, pretrained_params(origin, shardings))
    return TrainedPolicy(init_state_fn.policy, state.params, shardings, mesh, tokenizer, origin, state.rng, None)


def training_setup(config: Config, origin: Origin) -> tuple[Mesh, InitStateFn]:
    """The mesh, and the `init_state_fn` of the state that a run with this configuration trains."""
    policy = policy_from_config(config, origin.model_config)
    # The number of updates changes the schedule only, never the optimizer's state.
    _, optimizer = create_training_optimizer(config, policy, num_updates=shortest_run(config.optimizer))
    return create_mesh(config.mesh), InitStateFn(policy, optimizer, config.seed)


def load_checkpoint(config: Config, folder: str | os.PathLike, step: int | None = None) -> TrainedPolicy:
    """The weights of a run's checkpoint (None: the newest whole one). `config` is the run's own, see
    `rl.run_folder.folder.read_run`.

    The optimizer is neither built nor read, so its section of the configuration does not matter.

    Raises:
      ValueError: the run has no such checkpoint, or it is damaged, or its adapters were trained beside another base.
    """
    tokenizer, origin, mesh, init_state_fn = _decode_setup(config)
    if origin.model_config.lora is not None:
        _check_base(folder, origin)
    config = dataclasses.replace(config, output_dir=str(pathlib.Path(folder)))
    checkpoints = create_checkpoint_manager(config, mesh, init_state_fn, read_only=True)
    try:
        if step is None and checkpoints.latest_step is None:
            raise ValueError(
                f"run folder {str(folder)!r} must hold a checkpoint, and it has none; let the run reach "
                "checkpoint.every"
            )
        params, rng = checkpoints.restore_weights(step, frozen_base(config, mesh, init_state_fn, origin))
    finally:
        checkpoints.close()
    state, abstract = setup_decode_state(config, mesh, init_state_fn, params)
    shardings = abstract.shardings.params
    step = checkpoints.restored_step
    return TrainedPolicy(init_state_fn.policy, state.params, shardings, mesh, tokenizer, origin, rng, step)


def _check_base(folder: str | os.PathLike, origin: Origin) -> None:
    """ValueError where adapters were trained beside another base, which a checkpoint does not hold."""
    then, now = (
        {name: identity[name] for name in ("hash", "seed") if name in identity}
        for identity in (read_run(folder)[1]["policy"], origin.identity)
    )
    if now != then:
        raise ValueError(
            f"the base of the adapters in {folder} must be what they were trained beside, {then}, got {now}; put the "
            "old weights back, or name a copy of them (model.source); a base without a source is drawn from `seed`"
        )


def _decode_setup(config: Config) -> tuple[Tokenizer, Origin, Mesh, InitStateFn]:
    """Tokenizer, model and mesh, and the `init_state_fn` of a state to decode with: parameters, no optimizer."""
    tokenizer = tokenizer_from_config(config)
    origin = find_origin(config, tokenizer)
    policy = policy_from_config(config, origin.model_config)
    return tokenizer, origin, create_mesh(config.mesh), InitStateFn(policy, None, config.seed)
