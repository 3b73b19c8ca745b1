"""`grpo lora`: extracts adapters from a run, merges them into weights, unmerges, inspects them, and makes a run of
them.

In: run folders, PEFT folders, bases (Hugging Face folder, hub id or recipe). Out: a new PEFT folder, Hugging Face
folder or run folder, which is whole or not there at all; or a table on stdout. Elsewhere: the arithmetic
(`rl.models.lora`), the files (`rl.models.files.peft`, `rl.models.files.hf`).
"""

import argparse
import contextlib
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rl.config.load import Config, load_config
from rl.data.prompts import load_prompts
from rl.devices import hosts
from rl.devices.mesh import create_mesh
from rl.files.stores import check_path
from rl.models.files.hf import read_config, save_folder
from rl.models.files.lora_remainder import REMAINDER_FILE, read_remainder, restore_base
from rl.models.files.peft import base_name, load_adapter, read_adapter, stored_matrices
from rl.models.flavours import policy_from_config
from rl.models.lora import join, split, unmerge
from rl.run.checks import check_recipe
from rl.run.progress import Progress, run_identity
from rl.run_folder.contents import Step
from rl.run_folder.folder import RunFolder, check_trust, is_run_folder
from rl.run_folder.remote_steps import local_source
from rl.sampler.create import checked_sampling
from rl.state.checkpoint import create_checkpoint_manager
from rl.state.export import write_folder
from rl.state.optimizer import create_training_optimizer
from rl.state.origin import find_origin, tokenizer_from_config
from rl.state.states import InitStateFn, frozen_base, setup_training_state
from rl.tools.checkpoints.export import export_adapter
from rl.tools.step_option import step_option
from rl.tools.trained import TrainedPolicy, load_start, resolve_model

DTYPES = ("float32", "bfloat16", "float16")


def merge_into(
    base: str,
    adapter: str,
    out: str,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    keep_remainder: bool = True,
    trust: bool = False,
) -> TrainedPolicy:
    """Writes base + adapter as a Hugging Face folder, with the base's tokenizer. Returns the policy that was read.

    Args:
      dtype: the stored type; None: the base's.
      keep_remainder: whether to write the file with which `unmerge_from` restores the base bit for bit.
      trust: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: there is no such base or adapter, the adapter does not fit the base, or `out` holds something.
    """
    trained = load_start(resolve_model(base, overrides, adapter=adapter, trust=trust).config)
    config, dtype = trained.origin.model_config, dtype or _stored_dtype(trained)
    write_folder(out, config, trained.params, trained.tokenizer, dtype, keep_remainder=keep_remainder)
    return trained


def unmerge_from(
    merged: str,
    adapter: str,
    out: str,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    trust: bool = False,
) -> TrainedPolicy:
    """Writes merged - adapter, the base, as a Hugging Face folder.

    The base is exact bit for bit where `merge_into` or an export left a remainder; otherwise `rl.models.lora.merge`
    says how exact it is. Arguments and errors are those of `merge_into`. A remainder of other weights or another
    adapter is a ValueError as well.
    """
    trained = load_start(resolve_model(merged, overrides, adapter=adapter, trust=trust).config)
    config, dtype = trained.origin.model_config, dtype or _stored_dtype(trained)
    adapters, whole = split(config, trained.params)
    remainder = read_remainder(_folder(trained))
    base = unmerge(config, whole, adapters) if remainder is None else restore_base(config, whole, adapters, remainder)
    save_folder(out, config, base, tokenizer=trained.tokenizer, dtype=dtype)
    return trained


def inspect(source: str, step: Step | None = None, trust: bool = False) -> dict[str, Any]:
    """The settings of an adapter, its number of parameters and, for each matrix, the Frobenius norms of A, B and scale
    A B.

    Args:
      source: a PEFT folder, or a run that trained adapters.
      step: the step of the run's checkpoint; None: the newest.
      trust: see `rl.run_folder.folder.check_trust`.
    """
    with _as_peft(source, step, trust) as folder:
        settings, base = read_adapter(folder), base_name(folder)
        matrices, dtypes, num_parameters = [], set(), 0
        for module, a_RI, b_OR in stored_matrices(folder):
            dtypes |= {str(a_RI.dtype), str(b_OR.dtype)}
            num_parameters += a_RI.size + b_OR.size
            a, b = a_RI.astype(np.float64), b_OR.astype(np.float64)
            # |B A|^2 = sum of (A A^T) * (B^T B): two small matrices instead of the whole product.
            product = np.sqrt(max(float(np.sum((a @ a.T) * (b.T @ b))), 0.0))
            matrices.append(
                {
                    "module": module,
                    "inputs": a.shape[1],
                    "outputs": b.shape[0],
                    "norm_a": float(np.linalg.norm(a)),
                    "norm_b": float(np.linalg.norm(b)),
                    "norm": settings.scale * product,
                }
            )
    return {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "scale": settings.scale,
        "rank_stabilized": settings.rank_stabilized,
        "base": base,
        "dtype": " ".join(sorted(dtypes)),
        "parameters": num_parameters,
        "matrices": matrices,
    }


def to_run(adapter: str, run: str, recipe: str, overrides: Sequence[str] = (), trust: bool = False) -> pathlib.Path:
    """Makes a run folder whose checkpoint 0 holds the adapter.

    `grpo train RUN/config.yml` continues from it, and `grpo eval` and `grpo sample` read it. The adapter's folder is
    not needed any more, the base of `model.source` is.

    Args:
      recipe: the recipe of the run; rank, alpha and targets are the adapter's.
      trust: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: `grpo train` would refuse the recipe, the adapter does not fit, or `run` holds something.
    """
    if pathlib.Path(run).exists() and (not pathlib.Path(run).is_dir() or any(pathlib.Path(run).iterdir())):
        raise ValueError(f"the run folder must be new or empty, got {run}; choose another one or remove it")
    config = _run_config(adapter, run, recipe, overrides, trust)
    tokenizer = tokenizer_from_config(config)
    data = load_prompts(config, tokenizer)
    origin = find_origin(config, tokenizer)
    sampling = checked_sampling(config, origin.model_config, tokenizer)
    check_recipe(config, data, sampling, origin.model_config.max_position_embeddings)
    policy, mesh = policy_from_config(config, origin.model_config), create_mesh(config.mesh)
    _, optimizer = create_training_optimizer(config, policy)
    init_state_fn = InitStateFn(policy, optimizer, config.seed)
    with contextlib.ExitStack() as stack:
        # Until the checkpoint is complete the folder holds no run, and closing it leaves nothing behind.
        folder = RunFolder(config, "grpo", run_identity(config, origin, data))
        stack.callback(folder.close)
        folder.begin()
        checkpoints = create_checkpoint_manager(config, mesh, init_state_fn)
        stack.callback(checkpoints.close)
        shardings = checkpoints.abstract.shardings.params
        params = join(
            load_adapter(adapter, origin.model_config, shardings), frozen_base(config, mesh, init_state_fn, origin)
        )
        state, _ = setup_training_state(config, mesh, init_state_fn, params)
        checkpoints.save(0, state, Progress.start(config).record(policy.flavour, data.num_positions))
        checkpoints.wait()
        return folder.path


def _run_config(adapter: str, run: str, recipe: str, overrides: Sequence[str], trust: bool) -> Config:
    """The recipe with the adapter's rank, alpha and targets, and without its folder."""
    start = load_config(recipe, [*overrides, "lora.rank=0", f"lora.adapter={json.dumps(adapter)}"])
    hosts.check_alone(start.distributed)
    check_trust(recipe, start, overrides, trust=trust)
    lora = find_origin(start, tokenizer_from_config(start)).model_config.lora
    assert lora is not None
    values = {
        "output_dir": run,
        "lora.adapter": None,
        "lora.rank": lora.rank,
        "lora.alpha": lora.alpha,
        "lora.targets": list(lora.targets),
        "lora.rank_stabilized": lora.rank_stabilized,
    }
    return load_config(recipe, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())])


@contextlib.contextmanager
def _as_peft(source: str, step: Step | None, trust: bool) -> Iterator[pathlib.Path]:
    """A folder in PEFT's format: `source` itself, or a temporary one with the adapter of a run."""
    path = local_source(source, step)
    if not is_run_folder(path):
        if step is not None:
            raise ValueError(f"--step needs a run folder, got {source!r}")
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        export_adapter(path, pathlib.Path(scratch) / "adapter", step, trust)
        yield pathlib.Path(scratch) / "adapter"


def _stored_dtype(trained: TrainedPolicy) -> str:
    return read_config(_folder(trained)).param_dtype


def _folder(trained: TrainedPolicy) -> pathlib.Path:
    assert trained.origin.folder is not None  # an adapter is refused beside a fresh model
    return trained.origin.folder


def _print_inspection(found: dict[str, Any]) -> None:
    method = "alpha / sqrt(rank)" if found["rank_stabilized"] else "alpha / rank"
    print(f"rank {found['rank']}, alpha {found['alpha']:g}, scale {found['scale']:g} ({method})")
    print(f"{len(found['matrices'])} matrices, {found['parameters']:,} parameters in {found['dtype']}")
    print(f"base: {found['base'] or 'not named'}")
    width = max(len(matrix["module"]) for matrix in found["matrices"])
    print(f"{'matrix':<{width}}  inputs x outputs        |A|        |B|  |scale A B|")
    for matrix in found["matrices"]:
        shape = f"{matrix['inputs']} x {matrix['outputs']}"
        norms = f"{matrix['norm_a']:10.4g} {matrix['norm_b']:10.4g} {matrix['norm']:12.4g}"
        print(f"{matrix['module']:<{width}}  {shape:>16} {norms}")


def _main_extract(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="grpo lora extract")
    parser.add_argument("run", help="run folder that trained adapters")
    parser.add_argument("out", help="PEFT folder to write")
    parser.add_argument("--step", type=step_option, default=None, help="checkpoint, or best; the newest when left out")
    _add_trust(parser)
    arguments = parser.parse_args(argv)
    step = export_adapter(arguments.run, arguments.out, arguments.step, arguments.trust)
    print(f"adapter of step {step} of {arguments.run} written to {arguments.out}")


def _main_sum(name: str, function: Callable[..., TrainedPolicy], argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"grpo lora {name}")
    parser.add_argument("model", help="Hugging Face folder, hub id or recipe")
    parser.add_argument("adapter", help="PEFT folder")
    parser.add_argument("out", help="Hugging Face folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="of the folder; the model's own when left out")
    if name == "merge":
        parser.add_argument(
            "--no-remainder",
            dest="keep_remainder",
            action="store_false",
            help=f"leave out {REMAINDER_FILE}, with which unmerge gives MODEL back bit for bit",
        )
    _add_trust(parser)
    arguments = vars(parser.parse_intermixed_args(argv))
    model, adapter, out = (arguments.pop(key) for key in ("model", "adapter", "out"))
    function(model, adapter, out, **arguments)
    sign = "+" if name == "merge" else "-"
    print(f"{model} {sign} {adapter} written to {out}")


def _main_inspect(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="grpo lora inspect")
    parser.add_argument("source", help="PEFT folder, or run that trained adapters")
    parser.add_argument(
        "--step", type=step_option, default=None, help="of a run's checkpoint, or best; the newest when left out"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_trust(parser)
    arguments = parser.parse_args(argv)
    found = inspect(arguments.source, arguments.step, arguments.trust)
    if arguments.json:
        print(json.dumps(found))
    else:
        _print_inspection(found)


def _main_convert(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="grpo lora convert")
    parser.add_argument("source", help="PEFT folder, or run that trained adapters")
    parser.add_argument("out", help="what to write: a run, or a PEFT folder")
    parser.add_argument("recipe", nargs="*", metavar="RECIPE key=value", help="of the run to write")
    _add_trust(parser)
    arguments = parser.parse_intermixed_args(argv)
    check_path(arguments.out, "OUT", may_be_remote=not arguments.recipe)
    source = str(local_source(arguments.source))
    if is_run_folder(source):
        if arguments.recipe:
            raise ValueError(f"a run is converted without a recipe, got {' '.join(arguments.recipe)}")
        _main_extract([source, arguments.out, *(["--trust"] if arguments.trust else [])])
    elif not arguments.recipe:
        raise ValueError(
            f"{arguments.source!r} is no run, and an adapter becomes a run only with a RECIPE that names its base, its "
            "prompts and its rewards, got none"
        )
    else:
        folder = to_run(source, arguments.out, arguments.recipe[0], arguments.recipe[1:], arguments.trust)
        print(f"{arguments.source} is checkpoint 0 of {folder}; grpo train {folder}/config.yml goes on from it")


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
    )


_SUBCOMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "extract": _main_extract,
    "merge": functools.partial(_main_sum, "merge", merge_into),
    "unmerge": functools.partial(_main_sum, "unmerge", unmerge_from),
    "inspect": _main_inspect,
    "convert": _main_convert,
}


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo lora extract|merge|unmerge|inspect|convert ...`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in _SUBCOMMANDS:
        raise ValueError(f"grpo lora needs one of {', '.join(_SUBCOMMANDS)}, got {argv[0] if argv else 'nothing'}")
    _SUBCOMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    main()
