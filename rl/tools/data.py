"""`grpo data`: what can be known of a recipe's prompts before training. Here `grpo data bench`: how fast they are read,
filtered and tokenised (MaxText: `standalone_dataloader`). `grpo data passrate` is `rl.tools.passrate`.

In: a configuration. Out: rows and tokens per second, numbers of rows kept and dropped, lengths, and the memory of this
process. The data rows are those of training, through the same `rl.data.prompts.load_prompts`. No model is read and no
device is touched. Training does all this once, before the first step. A step then chooses rows in memory, which is
timed too.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rl.config.load import Config, load_config
from rl.data.order import order_of
from rl.data.prompts import load_prompts
from rl.data.tokenizer import BYTE_SOURCE, Tokenizer
from rl.devices.host_memory import peak_bytes, start_peak
from rl.errors import MissingError
from rl.files.output_file import check_writable
from rl.models.files.folders import write_json
from rl.run_folder.folder import check_trust
from rl.run_folder.trust import TO_READ
from rl.state.origin import tokenizer_from_config


class DataBench(NamedTuple):
    """What was measured.

    Attributes:
      source: data.source, the names of data.sources, or rollout.environment without data.
      num_rows: rows read from data.source and data.eval_source. Each counts in one of num_train, num_held_out,
        num_dropped (the prompt is longer than data.max_prompt_length) and num_removed (another row with its question is
        held out).
      num_tokens, longest_prompt, mean_prompt: in tokens, over the prompts in num_train and num_held_out.
      tokenizer_seconds: until the tokenizer was ready. seconds: from then until all rows were ready. step_seconds: for
        choosing the rows of one step, on average.
      start_bytes, peak_bytes: the most memory of this process on the host before the first row, and after the last one.
      messages: training's remarks about these rows.
    """

    source: str
    num_rows: int
    num_train: int
    num_held_out: int
    num_dropped: int
    num_removed: int
    num_tokens: int
    longest_prompt: int
    mean_prompt: float
    tokenizer_seconds: float
    seconds: float
    step_seconds: float
    start_bytes: int
    peak_bytes: int
    messages: list[str]


def bench(
    recipe: str | pathlib.Path, num_steps: int = 10, overrides: Sequence[str] = (), trust: bool = False
) -> DataBench:
    """Loads the prompts of a recipe as `grpo train` does, and chooses the prompts of its first `num_steps` steps.

    Args:
      trust: see `rl.run_folder.folder.check_trust`; a recipe of a run folder may name a function that prepares rows.

    Raises:
      ValueError: `grpo train` would refuse the data, there are fewer rows than grpo.prompts_per_step, or `num_steps` is
        below 1.
    """
    if num_steps < 1:
        raise ValueError(f"--steps must be >= 1, got {num_steps}")
    config = load_config(recipe, overrides)
    check_trust(recipe, config, overrides, TO_READ, trust)
    start = time.perf_counter()
    tokenizer, problem = _tokenizer(config)
    tokenizer_seconds = time.perf_counter() - start
    start_peak()
    start_bytes, start = peak_bytes(), time.perf_counter()
    data = load_prompts(config, tokenizer)
    messages, num_rows, num_dropped, lengths = [*problem, *data.messages], data.num_rows, data.num_dropped, []
    if data.stream is not None:  # every block is read, so that what is wrong in one is seen before a run
        for number in range(1, data.stream.num_blocks):
            lengths += [len(row.prompt_ids) for row in data.stream.block(number)]
            num_rows += data.stream.counts[number][0]
            num_dropped += data.stream.counts[number][1]
        messages += data.stream.take_messages()
    seconds = time.perf_counter() - start
    peak, start = peak_bytes(), time.perf_counter()
    order = order_of(config.data, data, config.seed, config.grpo.prompts_per_step)
    position = 0
    for _ in range(num_steps):
        position = order.take(position, config.grpo.prompts_per_step)[1]
    step_seconds = (time.perf_counter() - start) / num_steps
    lengths += [len(row.prompt_ids) for row in (*data.train, *data.held_out)]
    return DataBench(
        source=config.data.source or ", ".join(entry.label for entry in config.data.sources) or "rollout.environment",
        num_rows=num_rows,
        num_train=len(lengths) - len(data.held_out),
        num_held_out=len(data.held_out),
        num_dropped=num_dropped,
        num_removed=num_rows - len(lengths) - num_dropped,
        num_tokens=sum(lengths),
        longest_prompt=max(lengths),
        mean_prompt=sum(lengths) / len(lengths),
        tokenizer_seconds=tokenizer_seconds,
        seconds=seconds,
        step_seconds=step_seconds,
        start_bytes=start_bytes,
        peak_bytes=peak,
        messages=messages,
    )


def _tokenizer(config: Config) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of the recipe. Where its model is not there yet, because another stage will write it for instance,
    bytes, and a message that says so.
    """
    try:
        return tokenizer_from_config(config), []
    except MissingError:
        if config.tokenizer.source is not None or config.model.source is None:
            raise
    said = f"model.source {config.model.source!r} is not there, so tokens are bytes here (tokenizer.source=byte)"
    tokenizer = dataclasses.replace(config.tokenizer, source=BYTE_SOURCE)  # pyright: ignore[reportArgumentType]
    return tokenizer_from_config(dataclasses.replace(config, tokenizer=tokenizer)), [said]  # pyright: ignore[reportArgumentType]


def report(result: DataBench) -> list[str]:
    """The result in words."""
    rates = to_json(result)
    speed = f"{rates['rows_per_second']:,.0f} rows/s, {rates['tokens_per_second']:,.0f} tokens/s"
    kept = f"{result.num_train + result.num_held_out:,}"
    parts = f"{result.num_train:,} to train, {result.num_held_out:,} held out"
    left_out = f"dropped {result.num_dropped:,} as too long, {result.num_removed:,} as questions that are held out"
    lengths = f"{result.mean_prompt:.1f} tokens on average, {result.longest_prompt:,} at most"
    memory = f"{result.peak_bytes / 1e6:,.0f} MB at most, {result.start_bytes / 1e6:,.0f} MB before the first row"
    return [
        f"{result.source}: {result.num_rows:,} rows in {result.seconds:.3f} s, {speed}",
        f"kept {kept} ({parts}), {left_out}",
        f"prompts: {lengths}, {result.num_tokens:,} in all",
        f"tokenizer: {result.tokenizer_seconds:.3f} s; the rows of a step: {1000 * result.step_seconds:.3f} ms",
        f"memory of this process: {memory}",
        *result.messages,
    ]


def to_json(result: DataBench) -> dict[str, Any]:
    """The result as an object for JSON, with rows and tokens per second."""
    rates = {
        "rows_per_second": result.num_rows / result.seconds,
        "tokens_per_second": result.num_tokens / result.seconds,
    }
    return result._asdict() | rates


def main(argv: Sequence[str] | None = None) -> int:
    """`grpo data bench CONFIG [--steps N] [--json FILE] [--trust] [key=value ...]`, or passrate; the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name == "passrate":
        from rl.tools import passrate

        return passrate.main(rest)
    if name != "bench":
        raise ValueError(f"grpo data needs bench or passrate, got {name!r}")
    parser = argparse.ArgumentParser(prog="grpo data bench", description=__doc__)
    parser.add_argument("config", help="YAML recipe")
    parser.add_argument("--steps", type=int, default=10, help="of how many steps the rows are chosen")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the same numbers")
    parser.add_argument("--trust", action="store_true", help="run code that config.yml of a run folder names, as it is")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides with dotted keys")
    arguments = parser.parse_intermixed_args(rest)
    check_writable(arguments.json, "--json")
    result = bench(arguments.config, arguments.steps, arguments.overrides, arguments.trust)
    print("\n".join(report(result)))
    if arguments.json is not None:
        write_json(pathlib.Path(arguments.json), to_json(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
