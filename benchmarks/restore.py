"""What comparing a checkpoint's files with their hashes (`checkpoint.verify`) adds to the seconds of a restore.

One state of AdamW with float32 weights is saved once, in a temporary folder, and restored with and without the
comparison in turn, by a new reader each time. The files were just written, so that both read memory, not a disk: a
slower disk makes the comparison, which runs beside the reading, a smaller part.

    python benchmarks/restore.py [--layers 14] [--rounds 9]
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence

import jax

from rl.config.load import load_config
from rl.state.checkpoint import create_checkpoint_manager
from rl.state.origin import find_origin, tokenizer_from_config
from rl.state.states import setup_training_state
from rl.tools.checkpoints.checkpoint_bench import fill_moments
from rl.tools.trained import training_setup

RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "base.yml"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=14, help="of width 512; 14 make a state of 0.65 GB (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="restores of either kind (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        measure(pathlib.Path(scratch), arguments.layers, arguments.rounds)


def measure(folder: pathlib.Path, layers: int, rounds: int) -> None:
    """Prints the median seconds with and without the comparison, and by how much the first are more."""
    shape = [f"model.arch.{key}" for key in (f"num_layers={layers}", "hidden_size=512", "intermediate_size=2304")]
    config = load_config(RECIPE, (f"output_dir={folder}", "data.source=arithmetic", *shape))
    mesh, init_state_fn = training_setup(config, find_origin(config, tokenizer_from_config(config)))
    writer = create_checkpoint_manager(config, mesh, init_state_fn)
    state = fill_moments(setup_training_state(config, mesh, init_state_fn)[0])
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    writer.save(1, state, {"step": 1})
    writer.close()
    del state

    def seconds(verify: bool) -> float:
        section = ("checkpoint.verify=true" if verify else "checkpoint.verify=false",)
        chosen = load_config(RECIPE, (f"output_dir={folder}", "data.source=arithmetic", *shape, *section))
        reader = create_checkpoint_manager(chosen, mesh, init_state_fn, read_only=True)
        start = time.perf_counter()
        jax.block_until_ready(reader.restore()[0])
        taken = time.perf_counter() - start
        reader.close()
        return taken

    seconds(False)  # what is imported and compiled once
    pairs = [(seconds(False), seconds(True)) for _ in range(rounds)]
    without, compared = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"state of {num_bytes / 1e9:.2f} GB, {rounds} restores of either kind in turn, medians")
    print(f"not compared {without:.2f} s, compared {compared:.2f} s: {100 * (compared / without - 1):+.1f} %")


if __name__ == "__main__":
    main()
