"""`grpo data passrate MODEL CONFIG`: how often a model answers each training prompt of a recipe right, before training.

In: a model, and a recipe with data, reward functions and sampling. Out: the recipe's data with the columns `pass_rate`
and `pass_rate_draws`, which `data.curriculum.by=pass_rate` takes as what is known at the start. A pass rate is what a
run measures (`rl.data.curriculum`): the mean over a prompt's completions of the reward that counts, cut to 0..1. As
many completions as in a step of the recipe are drawn at a time, and what was measured is then kept. A completion
depends on the weights, the seed, its prompt's number and its own, so a stopped command goes on as if it had not been.
Not here: the files (`rl.tools.passrate_file`).
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from rewards.batch import FAILURES
from rewards.moment import Moment
from rewards.runner import RewardRunner
from rl.config.load import Config
from rl.config.ranges import LARGEST_GROUP
from rl.data.curriculum import PASS_RATE
from rl.data.prompts import PromptData, fingerprint, held_out_fingerprint, load_prompts
from rl.devices import hosts
from rl.devices.mesh import create_mesh
from rl.devices.programs import use_compilation_cache
from rl.files.local_files import file_hash
from rl.files.output_file import writing
from rl.rollout.groups import counted_function, judge, pass_rates
from rl.rollout.reward_model import open_reward_models, weight_bytes
from rl.rollout.scoring import sample_and_score, start_rewards
from rl.run.checks import check_recipe
from rl.run.metrics import Stopwatch
from rl.run_folder.contents import Step
from rl.run_folder.folder import check_trust
from rl.run_folder.trust import MODEL, REWARDS, TO_EVALUATE, code_of
from rl.sampler.create import checked_sampling, create_sampler
from rl.sampler.token_draw import SamplingParams
from rl.state.origin import Origin, find_origin, reward_model_identity, tokenizer_from_config
from rl.tools.passrate_file import (
    PartFile,
    Rate,
    check_outputs,
    encode_outputs,
    output_paths,
    write_outputs,
)
from rl.tools.samples.sample import draw_settings, progress, weight_settings
from rl.tools.step_option import step_option
from rl.tools.trained import TrainedPolicy, WeightSource, load_source, resolve_for, with_step

_STREAM = 5  # keeps the draws apart from those of a run with the same seed
_SAY_SECONDS = 30.0  # between two lines about the progress where there is no bar


class Passed(NamedTuple):
    """What was measured.

    Attributes:
      rates: of every training row. num_new: rows measured by this call, the others by earlier ones that were stopped.
      files: what was written. draws: completions of each prompt. band: data.curriculum.band.
      how: overrides with which `grpo train` takes the file; None where entries of data.sources must name the files.
    """

    rates: list[Rate]
    num_new: int
    files: list[str]
    draws: int
    band: Sequence[float]
    how: list[str] | None


def passrate(
    model: str,
    recipe: str,
    output: str,
    draws: int | None = None,
    step: Step | None = None,
    adapter: str | None = None,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    trust: bool = False,
) -> Passed:
    """Measures the pass rate of every training prompt of a recipe, and writes the recipe's data with it.

    Args:
      model, step, adapter: see `rl.tools.trained.resolve_for`.
      output: a .jsonl or .parquet file. With `{source}` in its name there is one for each source of a mixture.
      draws: completions of each prompt; None: grpo.group_size.
      overwrite: replace the output, and throw away what a stopped call with other settings has measured.
      trust: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: training would refuse the recipe or the model, the output exists or cannot be written, a stopped call
        with other settings has left its rates, or a reward function fails on more than rewards.max_failed_share.
    """
    if draws is not None and not 1 <= draws <= LARGEST_GROUP:
        raise ValueError(f"--draws must be from 1 to {LARGEST_GROUP}, got {draws}")
    source, config = resolve_for(model, recipe, overrides, step, adapter)
    if config.data.streaming:
        raise ValueError(
            "data.streaming must be false to measure pass rates, which are written with all rows, got true; set "
            "data.streaming=false and measure a part, such as data.source=FILE[:10000]"
        )
    paths = output_paths(output, config.data)
    with hosts.joined(config.distributed):
        check_trust(recipe, config, overrides, TO_EVALUATE, trust)
        check_trust(source.run or model, config, overrides, (MODEL,), trust)
        hosts.from_first(lambda: check_outputs(paths, overwrite))
        use_compilation_cache(config)
        step = hosts.from_first(lambda: with_step(source, _say).step)
        source = dataclasses.replace(source, step=step)
        rates, num_new = _measured(config, source, output, draws or config.grpo.group_size, overwrite)
    how = None if config.data.sources else _overrides(config, output)
    return Passed(rates, num_new, paths, draws or config.grpo.group_size, config.data.curriculum.band, how)


def _measured(config: Config, source: WeightSource, output: str, draws: int, overwrite: bool) -> tuple[list[Rate], int]:
    """Measures what is not known yet, and writes the output. Returns the rates of all rows, and how many are new."""
    config.rollout.refuse_turns("grpo data passrate")
    tokenizer = tokenizer_from_config(config)
    data = load_prompts(config, tokenizer)
    for text in (*data.messages, tokenizer.template_kwargs_problem()):
        if text and hosts.is_first():
            _say(text)
    origin = find_origin(source.config, tokenizer)
    sampling = dataclasses.replace(checked_sampling(config, origin.model_config, tokenizer), reports_kept=False)
    check_recipe(config, data, sampling, origin.model_config.max_position_embeddings)
    encode_outputs(output, config.data, data, {})  # values that the format cannot hold are refused now
    size = max(1, config.grpo.prompts_per_step * config.grpo.group_size // draws)
    settings = _settings(config, source, origin, data, sampling, draws, size)
    with contextlib.ExitStack() as stack:
        part: list[PartFile] = []  # in the first process

        def open_part() -> list[tuple[int, float | None, int]]:
            part.append(stack.enter_context(PartFile(output, settings, overwrite)))
            return [(row, rate.rate, rate.draws) for row, rate in part[0].rates.items()]

        rates = {row: Rate(rate, num) for row, rate, num in hosts.from_first(open_part)}
        known = len(rates)
        if known and hosts.is_first():
            _say(f"{known:,} of {len(data.train):,} prompts are measured already")
        chunks = [range(start, min(start + size, len(data.train))) for start in range(0, len(data.train), size)]
        chunks = [chunk for chunk in chunks if any(row not in rates for row in chunk)]
        if chunks:
            meter = stack.enter_context(_Meter(config, source, data, sampling, draws, size))
            advance = stack.enter_context(_progress(known, len(data.train)))
            for chunk in chunks:
                # A chunk that was kept in part is judged as a whole again, as a function of the batch needs it.
                found = {row: rate for row, rate in meter.measure(chunk).items() if row not in rates}
                hosts.from_first(lambda new=found: part[0].write(new))
                rates |= found
                advance(len(found))

        def finish() -> None:
            with writing(output):
                write_outputs(encode_outputs(output, config.data, data, rates))
            part[0].remove()

        hosts.from_first(finish)
    return [rates[row] for row in range(len(data.train))], len(rates) - known


class _Meter(contextlib.ExitStack):
    """A model with its sampler, and the running reward function that counts."""

    def __init__(
        self, config: Config, source: WeightSource, data: PromptData, sampling: SamplingParams, draws: int, size: int
    ) -> None:
        super().__init__()
        self._config, self._rows, self._sampling, self._draws = config, data.train, sampling, draws
        self._key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
        self._said: set[str] = set()
        mesh = create_mesh(config.mesh)
        judges = open_reward_models(config, mesh)
        self._runner: RewardRunner = self.enter_context(start_rewards(config, data.train, None, mesh, judges))
        self._name = counted_function(config, self._runner.specs)
        self._trained: TrainedPolicy = load_source(source)
        where = self._trained.policy, self._trained.mesh, self._trained.shardings, self._trained.tokenizer
        self._sampler = self.enter_context(
            contextlib.closing(create_sampler(config, *where, beside=weight_bytes(judges)))
        )
        # All prompts, so that a stopped measurement goes on in the same shapes.
        self._sampler.expect([row.prompt_ids for row in data.train], size, draws)
        self._sampler.check(size, draws, sampling)

    def measure(self, chunk: range) -> dict[int, Rate]:
        """Draws and judges completions of these rows.

        Raises:
          ValueError: the function failed on more than rewards.max_failed_share of them.
        """
        rows = [self._rows[row] for row in chunk]
        scored = sample_and_score(
            self._sampler,
            self._trained.params,
            rows,
            self._draws,
            self._sampling,
            self._key,
            self._runner,
            self._trained.tokenizer,
            Stopwatch(),
            chunk,
            names=[self._name],
            moment=Moment(max_steps=self._config.grpo.steps),
            seed=self._config.seed,
        )
        problems = [text for text in scored.result.problems if text not in self._said]
        self._said.update(problems)
        for text in problems if hosts.is_first() else ():
            _say(text)
        counts, total = scored.result.counts[self._name], len(rows) * self._draws
        failed, most = sum(counts[kind] for kind in FAILURES), self._config.rewards.max_failed_share
        if failed > most * total:
            raise ValueError(
                f"rewards.max_failed_share must be at least the share of completions on which a reward function fails, "
                f"got {most:g}, while {self._name!r} failed on {failed} of {total}; what was measured before them is "
                "kept: mend the function, and pass --overwrite if that changes its rewards"
            )
        judged = judge(self._config, rows, scored, self._runner.specs)
        rates = dict.fromkeys(chunk, Rate(None, 0))
        numbers = {id(row): number for row, number in zip(rows, chunk, strict=True)}
        return rates | {numbers[id(row)]: Rate(rate, num) for row, rate, num in pass_rates(judged, self._name)}


def _settings(
    config: Config,
    source: WeightSource,
    origin: Origin,
    data: PromptData,
    sampling: SamplingParams,
    draws: int,
    size: int,
) -> dict[str, Any]:
    """Everything that decides the rates, flat and JSON-able."""
    settings = weight_settings(source, origin) | draw_settings(config, sampling) | {"seed": config.seed}
    settings |= {"draws": draws, "prompts at a time": size, "eval.reward": config.eval.reward}
    settings |= {"data": fingerprint(data.train), "held out": held_out_fingerprint(data.held_out)}
    settings |= {f"reward {entry.label}": dataclasses.asdict(entry) for entry in config.rewards.functions}  # pyright: ignore[reportArgumentType]
    for code in code_of(config):
        if code.kind == REWARDS and code.file is not None:
            settings[f"file of {code.key} {code.name}"] = file_hash(code.file)
    return settings | reward_model_identity(config)


def _overrides(config: Config, output: str) -> list[str]:
    """With which `grpo train` takes the output of one source."""
    prepared = ["data.prepare=null"] if config.data.prepare is not None else []
    args = [f"data.args.{name}=null" for name in config.data.args]
    return [f"data.source={output}", *args, *prepared, f"data.curriculum.by={PASS_RATE}"]


@contextlib.contextmanager
def _progress(done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line now and then. The yielded function takes a number of prompts."""
    said = start = time.monotonic()
    num = done
    with progress(done, total, sys.stderr.isatty() and hosts.is_first()) as advance:

        def add(count: int) -> None:
            nonlocal said, num
            num += count
            for _ in range(count):
                advance(0)
            now = time.monotonic()
            if now - said >= _SAY_SECONDS and hosts.is_first() and not sys.stderr.isatty():
                said, left = now, (now - start) / (num - done) * (total - num)
                _say(f"{num:,} of {total:,} prompts, about {left / 60:.0f} minutes left")

        yield add


def report(passed: Passed) -> list[str]:
    """The result in words."""
    known = [rate.rate for rate in passed.rates if rate.rate is not None]
    again = len(passed.rates) - passed.num_new
    lines = [
        f"{len(passed.rates):,} prompts with {passed.draws} completions each"
        + f", {again:,} of them measured by earlier calls" * bool(again)
    ]
    if known:
        low, high = passed.band
        never, always = (sum(rate == value for rate in known) / len(known) for value in (0.0, 1.0))
        inside = sum(low <= rate <= high for rate in known) / len(known)
        lines.append(
            f"pass rate {sum(known) / len(known):.1%} on average; {never:.1%} of the prompts are never right, "
            f"{always:.1%} always, {inside:.1%} in data.curriculum.band [{low:g}, {high:g}]"
        )
    if len(known) < len(passed.rates):
        lines.append(f"{len(passed.rates) - len(known):,} prompts have no pass rate: no completion could be judged")
    where = ", ".join(passed.files)
    if passed.how is None:
        return [
            *lines,
            f"written to {where}; name it in data.sources or data.source, without the args of the old source",
        ]
    return [*lines, f"written to {where}; grpo train takes it with {' '.join(passed.how)}"]


def main(argv: Sequence[str] | None = None) -> int:
    """`grpo data passrate MODEL CONFIG --output FILE [--draws N] [--step N] [--adapter FOLDER] [--overwrite] [--trust]
    [key=value ...]`; the exit status.
    """
    parser = argparse.ArgumentParser(prog="grpo data passrate", description="pass rates of a recipe's training prompts")
    parser.add_argument("model", help="run folder, Hugging Face folder or hub id, or YAML recipe, CONFIG itself too")
    parser.add_argument("config", help="YAML recipe with data, rewards and sampling")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides with dotted keys")
    parser.add_argument("--output", required=True, metavar="FILE", help=".jsonl or .parquet; {source}: one for each")
    parser.add_argument("--draws", type=int, help="completions of each prompt; grpo.group_size when left out")
    parser.add_argument("--step", type=step_option, help="the checkpoint of a run, or best; the newest when left out")
    parser.add_argument("--adapter", metavar="FOLDER", help="an adapter in PEFT's format beside MODEL's weights")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, and drop what other settings measured")
    parser.add_argument("--trust", action="store_true", help="run code that a run folder's config.yml names, as it is")
    given = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    options = (given.output, given.draws, given.step, given.adapter, given.overwrite, given.overrides, given.trust)
    try:
        passed = passrate(given.model, given.config, *options)
    except KeyboardInterrupt:
        _say("stopped; what was measured is kept, and the same command goes on")
        return 130
    if hosts.is_first():
        print("\n".join(report(passed)))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
