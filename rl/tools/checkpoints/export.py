"""`grpo export RUN OUT`: the weights of a run as a folder of their own, without optimizer.

In: a run's checkpoint. Out: a Hugging Face folder that transformers, TRL, vLLM and Tandem open, or with `--format
params` a parameter-only checkpoint that Orbax and Tandem read (see `rl.state.param_folder`; MaxText:
`generate_param_only_checkpoint`), both with configuration, token ids, tokenizer and chat template. Adapters are merged
into the weights; a Hugging Face folder also holds what is needed to take them out again
(`rl.models.files.lora_remainder`). With `--adapter` they are written alone in PEFT's format. The folder is read back
and compared, and then appears as a whole.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from rl.models.files.lora_remainder import REMAINDER_FILE
from rl.models.files.peft import save_adapter
from rl.run_folder.contents import Step, chosen_step
from rl.run_folder.folder import check_trust, read_run
from rl.run_folder.remote_steps import local_source
from rl.run_folder.trust import MODEL
from rl.state.export import FORMATS, write_folder
from rl.tools.step_option import step_option
from rl.tools.trained import load_checkpoint


def export(
    run: str | pathlib.Path,
    out: str | pathlib.Path,
    step: Step | None = None,
    dtype: str | None = None,
    kind: str = "huggingface",
    keep_remainder: bool = True,
    trust: bool = False,
) -> int:
    """Writes checkpoint `step` (None: the newest) of a run folder to `out`. Returns the step.

    Args:
      out: must not exist, or be empty; written atomically.
      dtype: float32, bfloat16 or float16; None keeps the dtype of the checkpoint.
      kind: a name of `FORMATS`.
      keep_remainder: see `write_folder`.
      trust: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: `run` is no run folder, there is no such checkpoint, or `out` holds something.
    """
    folder = local_source(run, step)
    step = chosen_step(folder, step)
    config, _ = read_run(folder)
    check_trust(folder, config, (), (MODEL,), trust)
    trained = load_checkpoint(config, folder, step)
    trained.tokenizer.mark_prompts(config.data.chat)
    write_folder(out, trained.origin.model_config, trained.params, trained.tokenizer, dtype, kind, keep_remainder)
    assert trained.step is not None
    return trained.step


def export_adapter(
    run: str | pathlib.Path, out: str | pathlib.Path, step: Step | None = None, trust: bool = False
) -> int:
    """Writes the adapter of checkpoint `step` (None: the newest) as a folder that peft opens, with the tokenizer.
    Returns the step.

    Args:
      trust: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: `run` is no run folder, there is no such checkpoint, the run has no adapters, or `out` holds
        something.
    """
    folder = local_source(run, step)
    step = chosen_step(folder, step)
    config, _ = read_run(folder)
    if not config.lora.rank and config.lora.adapter is None:
        raise ValueError(f"--adapter needs a run that trained adapters (lora.rank), got {str(run)!r} with lora.rank 0")
    check_trust(folder, config, (), (MODEL,), trust)
    trained = load_checkpoint(config, folder, step)
    trained.tokenizer.mark_prompts(config.data.chat)
    save_adapter(out, trained.policy.config, trained.params, config.model.source, trained.tokenizer)
    assert trained.step is not None
    return trained.step


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo export RUN OUT [--step N|best] [--format FORMAT] [--dtype DTYPE] [--no-remainder] [--adapter]`."""
    parser = argparse.ArgumentParser(prog="grpo export", description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("out", help="folder to write")
    parser.add_argument(
        "--step", type=step_option, default=None, help="checkpoint to export, or best; the newest when left out"
    )
    parser.add_argument("--format", choices=tuple(FORMATS), default=None, help="huggingface when left out")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="the checkpoint's own when left out"
    )
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, in PEFT's format")
    parser.add_argument(
        "--no-remainder",
        dest="keep_remainder",
        action="store_false",
        help=f"of merged adapters: leave out {REMAINDER_FILE}, with which grpo lora unmerge gives the base bit for bit",
    )
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of the run folder, and code that it names, as they are"
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    run, out = arguments.run, arguments.out
    if not arguments.keep_remainder and (arguments.adapter or arguments.format == "params"):
        raise ValueError(
            f"--no-remainder must be left out with --adapter and --format params, which have no {REMAINDER_FILE}"
        )
    if arguments.adapter:
        for name in ("dtype", "format"):
            if value := getattr(arguments, name):
                raise ValueError(f"--{name} must be left out with --adapter, got {value}; adapters keep their own")
        step = export_adapter(run, out, arguments.step, arguments.trust)
    else:
        kind = arguments.format or "huggingface"
        step = export(run, out, arguments.step, arguments.dtype, kind, arguments.keep_remainder, arguments.trust)
    print(f"exported step {step} of {run} to {out}")


if __name__ == "__main__":
    main()
