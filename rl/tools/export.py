"""`grpo export RUN OUT`: the weights of a run as a Hugging Face folder that transformers, TRL, vLLM and Tandem open.

Adapters are merged into the weights, or with `--adapter` written alone in PEFT's format.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rl.models import foreign
from rl.models.hf import save_folder
from rl.models.lora import merge
from rl.models.peft import save_adapter
from rl.run_folder import read_run
from rl.trained import load_checkpoint


def export(run: str | pathlib.Path, out: str | pathlib.Path, step: int | None = None, dtype: str | None = None) -> int:
    """Writes checkpoint `step` (None: the newest) of a run folder to `out`; returns the step written.

    Args:
      out: must not exist or be empty; written atomically.
      dtype: float32, bfloat16 or float16; None keeps the dtype of the checkpoint.

    Raises:
      ValueError: not a run folder, no such checkpoint, or `out` holds something.
    """
    config, _ = read_run(run)
    trained = load_checkpoint(config, run, step)
    write_folder(out, trained.origin.model_config, trained.params, trained.tokenizer, dtype)
    assert trained.step is not None
    return trained.step


def export_adapter(run: str | pathlib.Path, out: str | pathlib.Path, step: int | None = None) -> int:
    """Writes the adapter of checkpoint `step` (None: the newest) as a folder that peft opens; returns the step written.

    Raises:
      ValueError: not a run folder, no such checkpoint, a run without adapters, or `out` holds something.
    """
    config, _ = read_run(run)
    if not config.lora.rank:
        raise ValueError(f"--adapter needs a run that trained adapters (lora.rank), got {str(run)!r} with lora.rank 0")
    trained = load_checkpoint(config, run, step)
    save_adapter(out, trained.policy.config, trained.params, config.model.source)
    assert trained.step is not None
    return trained.step


def write_folder(out: str | pathlib.Path, model_config: Any, params: Any, tokenizer: Any, dtype: str | None) -> None:
    """Weights, adapters merged into them, model configuration, tokenizer and its chat template.

    Of a module of the user's own: model.safetensors alone, see `rl.models.foreign.save_folder`.
    """
    if model_config.kind != "decoder":
        if dtype is not None:
            raise ValueError(f"--dtype must be left out for a model of another library or your own, got {dtype!r}")
        foreign.save_folder(out, model_config, params, tokenizer)
        return
    save_folder(out, model_config, merge(model_config, params), tokenizer=tokenizer, dtype=dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo export RUN OUT [--step N] [--dtype DTYPE | --adapter]`."""
    parser = argparse.ArgumentParser(prog="grpo export", description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to export; the newest when left out")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="the checkpoint's own when left out"
    )
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, in PEFT's format")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    if arguments.adapter and arguments.dtype:
        raise ValueError(f"--dtype must be left out with --adapter, got {arguments.dtype}; adapters keep their own")
    if arguments.adapter:
        step = export_adapter(arguments.run, arguments.out, arguments.step)
    else:
        step = export(arguments.run, arguments.out, arguments.step, arguments.dtype)
    print(f"exported step {step} of {arguments.run} to {arguments.out}")


if __name__ == "__main__":
    main()
