"""Completions of given prompts: `grpo sample MODEL --prompts FILE.jsonl --output FILE.jsonl`, or `--prompt TEXT`.

In: a model (run folder, Hugging Face folder or hub id, recipe) and prompts. Out: a JSON line for each completion,
written when it ends. A completion depends only on the weights, its prompt, the seed, the prompt's index and the
sample's index, so a stopped file can be finished later. Elsewhere: reading prompts (`rl.tools.samples.sample_prompts`),
the file (`rl.tools.samples.completion_file`), completions of a training run (`rl.tools.samples.replay`), drawing
(`rl.sampler.slot_sampler`).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rl.config.load import Config
from rl.config.ranges import LARGEST_SEED
from rl.config.user_files import file_hashes
from rl.data.tokenizer import Tokenizer
from rl.devices.programs import use_compilation_cache
from rl.files.stores import check_path, continued_file, local_copy
from rl.models.config import ModelConfig
from rl.run.heartbeat import heartbeat
from rl.run_folder.folder import read_run
from rl.run_folder.remote_steps import local_source
from rl.sampler.contract import Completion, CompletionSource, Request
from rl.sampler.create import create_sampler, eos_ids, sampling_params
from rl.sampler.token_draw import SamplingParams, check_vocabulary
from rl.state.origin import Origin, find_origin, tokenizer_from_config
from rl.tools.samples.completion_file import META_SUFFIX, CompletionFile
from rl.tools.samples.replay import compare, draw_again
from rl.tools.samples.replay_episode import play_again
from rl.tools.samples.sample_prompts import SampleRow, read_prompts, to_sample_rows
from rl.tools.step_option import step_option
from rl.tools.trained import WeightSource, load_source, resolve_model, with_step

REFRESH_SECONDS = 0.1  # between two looks of the progress bar


def sample(arguments: argparse.Namespace, model: str, overrides: Sequence[str]) -> int:
    """Runs the command. Returns the exit status."""
    check_path(arguments.prompts, "--prompts", may_be_remote=True)
    rows = read_prompts(local_copy(arguments.prompts)) if arguments.prompts else _given_prompts(arguments.prompt)
    check_path(arguments.output, "--output", may_be_remote=True)
    overrides = [*_prompt_overrides(arguments), *overrides]
    source = resolve_model(model, overrides, arguments.step, arguments.adapter, trust=arguments.trust)
    source = with_step(source, _say)
    config = source.config
    config.rollout.refuse_turns("grpo sample")
    use_compilation_cache(config)
    tokenizer = tokenizer_from_config(config)
    samples = to_sample_rows(rows, config.data, tokenizer, arguments.n, config.sampling.max_completion_length)
    if problem := tokenizer.template_kwargs_problem():
        _say(f"warning: {problem}")
    origin = find_origin(config, tokenizer)
    sampling = _sampling_of(config, origin.model_config, tokenizer, samples, arguments.top_logprobs)
    seed = config.seed if arguments.seed is None else arguments.seed
    requests = _requests_for(samples)
    with contextlib.ExitStack() as stack:
        write: Callable[[str], None] = _print_line
        if arguments.output is not None:
            settings = output_settings(source, origin, samples, sampling, seed, arguments.prompt_logprobs)
            path = stack.enter_context(continued_file(arguments.output, ("", META_SUFFIX)))
            file = stack.enter_context(CompletionFile(path, settings, arguments.overwrite))
            if file.cut:
                _say(f"cut off a half-written last line of {arguments.output} ({file.cut} bytes)")
            if file.done:
                requests = [r for r in requests if (r.prompt_index, r.sample_index) not in file.done]
                _say(f"{arguments.output} holds {len(file.done)} completions, {len(requests)} are left")
            write = file.write
        if not requests:
            return 0
        show_bar = sys.stderr.isatty() and (arguments.output is not None or not sys.stdout.isatty())
        trained = load_source(source)
        num_done, before = 0, len(file.done) if arguments.output is not None else 0
        advance = stack.enter_context(progress(before, before + len(requests), show_bar))
        if not show_bar:
            stack.enter_context(heartbeat(_say, lambda: f"{num_done} of {len(requests)} completions"))
        try:
            where = trained.policy, trained.mesh, trained.shardings, trained.tokenizer
            sampler = stack.enter_context(contextlib.closing(create_sampler(config, *where)))
            scores = {}
            if arguments.prompt_logprobs:
                scores = _prompt_scores(sampler, trained.params, samples, requests, sampling, config.grpo.logprob_chunk)
            for prompt, completion in draw(sampler, trained.params, samples, requests, sampling, seed):
                record = to_record(samples[prompt], completion, trained.tokenizer, sampling, scores.get(prompt))
                write(to_line(record))
                num_done += 1
                advance(len(completion.token_ids))
        except KeyboardInterrupt:
            kept = f"; {arguments.output} keeps them, the same command goes on" if arguments.output else ""
            _say(f"stopped after {num_done} of {len(requests)} completions{kept}")
            return 130
    return 0


def sample_rows(
    source: WeightSource, samples: Sequence[SampleRow], seed: int | None = None
) -> Iterator[dict[str, Any]]:
    """Draws every completion of the rows and yields a record of each as it ends, see `to_record`. seed: None: the
    run's.

    Raises:
      ValueError: see `check_rows`.
    """
    config, tokenizer = source.config, tokenizer_from_config(source.config)
    model_config = find_origin(config, tokenizer).model_config
    sampling = _sampling_of(config, model_config, tokenizer, samples)
    trained = load_source(source)
    where = trained.policy, trained.mesh, trained.shardings, trained.tokenizer
    with contextlib.closing(create_sampler(config, *where)) as sampler:
        seed = config.seed if seed is None else seed
        for prompt, completion in draw(sampler, trained.params, samples, _requests_for(samples), sampling, seed):
            yield to_record(samples[prompt], completion, tokenizer, sampling)


def _sampling_of(
    config: Config, model_config: ModelConfig, tokenizer: Tokenizer, samples: Sequence[SampleRow], top_logprobs: int = 0
) -> SamplingParams:
    """The sampling parameters for these rows. ValueError for rows that the model cannot take."""
    sampling = sampling_params(config, eos_ids(config, model_config, tokenizer))
    sampling = dataclasses.replace(sampling, top_logprobs=top_logprobs)
    check_rows(samples, sampling, model_config)
    sampling = dataclasses.replace(sampling, max_completion_length=max(row.limit for row in samples))
    check_vocabulary(sampling, model_config.vocab_size)
    return sampling


def _requests_for(samples: Sequence[SampleRow]) -> list[Request]:
    return [
        Request(prompt, prompt, number, row.limit, row.seed)
        for prompt, row in enumerate(samples)
        for number in range(row.num_samples)
    ]


def replay(run: str, step: str, prompt: str, sample: str, overrides: Sequence[str] = (), trust: bool = False) -> int:
    """Prints a completion of a training run, drawn again (see `rl.tools.samples.replay.draw_again`); of a run with
    environments an episode, played again (see `rl.tools.samples.replay_episode`), a line for each message.

    The line has no other columns of the data row. stderr says whether samples.jsonl holds the same completion. Returns
    the exit status: 1 where it holds another one.
    """
    for name, text in (("STEP", step), ("PROMPT", prompt), ("SAMPLE", sample)):
        if not text.isdecimal():
            raise ValueError(f"--replay: {name} must be a whole number, got {text!r}")
    folder = local_source(run, int(step) - 1 if int(step) > 1 else None, with_samples=True)
    where = f"step {step}, prompt {prompt}, sample {sample}"
    if read_run(folder)[0].rollout.has_turns:
        played = play_again(folder, int(step), int(prompt), int(sample), overrides, trust)
        for line in played.lines:
            _print_line(to_line(line))
        verdict = "; ".join(played.differences)
        equal = "its environment answers as samples.jsonl has it"
        _say(f"{where}: {f'NOT equal to samples.jsonl: {verdict}' if verdict else equal}")
        return 1 if verdict else 0
    replayed = draw_again(folder, int(step), int(prompt), int(sample), overrides, trust)
    source, limit = replayed.row, replayed.sampling.max_completion_length
    row = SampleRow(
        f"--replay: prompt {prompt}",
        source.prompt,
        source.prompt_ids.tolist(),
        1,
        limit,
        seed=None,
        row_id=None,
        columns={},
    )
    record = to_record(row, replayed.completion, replayed.tokenizer, replayed.sampling)
    _print_line(to_line(record))
    is_same, verdict = compare(folder, replayed)
    _say(f"{where}: {verdict}")
    return 0 if is_same else 1


def draw(
    sampler: CompletionSource,
    params: Any,
    samples: Sequence[SampleRow],
    requests: Sequence[Request],
    sampling: SamplingParams,
    seed: int,
) -> Iterator[tuple[int, Completion]]:
    """(prompt index, completion) of each request as it ends."""
    prompts, key = [row.prompt_ids for row in samples], jax.random.key(seed)
    sampler.expect(prompts)  # all prompts, so that a stopped file is finished in the same shapes
    for number, completion in sampler.stream(params, prompts, requests, sampling, key):
        yield requests[number].prompt, completion


def to_record(
    row: SampleRow,
    completion: Completion,
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    scores: np.ndarray | None = None,
) -> dict[str, Any]:
    """One line of the output.

    Keys:
      prompt_index, sample_index: row of the input and completion of that row, from 0.
      id, answer: those of the row, if it has them. row: its other columns, if any.
      prompt: the text or chat messages that the policy got, with the system prompt; null for token ids.
      completion: the text of token_ids without special tokens; it includes a stop string that ended it.
      num_tokens: the number of token_ids.
      token_ids: with the EOS, or the token that completes a stop string.
      logprobs: under softmax(logits / temperature), temperature 1 when greedy; null with `sampling.source`.
      sampler_logprobs: under the distribution really drawn from, after penalties and truncations; 0 when greedy. With
        `sampling.source` each may be null.
      finish_reason: eos, stop or length. stop_reason: the EOS id, the stop string, or null.
      top_logprobs: per position a list of [token id, log-prob], best first; with --top-logprobs only.
      prompt_ids, prompt_logprobs: with --prompt-logprobs only, under softmax(logits / temperature) of the weights
        that the completions are drawn with (those of sampling.weight_dtype); the first log-prob is null, for nothing
        comes before the first token of a prompt.

    Raises:
      ValueError: a log-prob of a token is not finite.
    """
    of_policy, of_sampler = completion.policy_logprobs, completion.sampler_logprobs
    finite = np.array([True]) if of_policy is None else np.isfinite(of_policy) & np.isfinite(of_sampler)
    if of_policy is not None and not finite.all():
        place = int(np.argmin(finite))
        values = of_policy[place], of_sampler[place]
        value = next(value for value in values if not math.isfinite(value))
        raise ValueError(
            f"{row.where}: log-probs must be finite, got {value} at token {place} of sample {completion.sample_index}; "
            "look for weights that are not (`grpo checkpoint verify` of a run), or raise sampling.temperature"
        )
    record: dict[str, Any] = {"prompt_index": completion.prompt_index, "sample_index": completion.sample_index}
    if row.row_id is not None:
        record["id"] = row.row_id
    others = {name: value for name, value in row.columns.items() if name != "answer"}
    if others:
        record["row"] = others
    if "answer" in row.columns:
        record["answer"] = row.columns["answer"]
    record |= {
        "prompt": row.prompt,
        "completion": tokenizer.decode(completion.token_ids),
        "num_tokens": len(completion.token_ids),
        "token_ids": completion.token_ids.tolist(),
        "logprobs": None if of_policy is None else _numbers(of_policy),
        "sampler_logprobs": _numbers(of_sampler),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if sampling.top_logprobs:
        pairs = zip(completion.top_ids.tolist(), completion.top_logprobs, strict=True)
        record["top_logprobs"] = [list(map(list, zip(ids, _numbers(values), strict=True))) for ids, values in pairs]
    if scores is not None:
        record |= {"prompt_ids": row.prompt_ids, "prompt_logprobs": [None, *_numbers(scores)]}
    return record


def to_line(record: dict[str, Any]) -> str:
    """The record as a line of JSON, with its line end."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def check_rows(samples: Sequence[SampleRow], sampling: SamplingParams, model_config: ModelConfig) -> None:
    """ValueError, naming the row, for token ids or lengths beyond the model's, and limits below the minimum."""
    for row in samples:
        if max(row.prompt_ids) >= model_config.vocab_size:
            raise ValueError(
                f"{row.where}: prompt_ids must be below {model_config.vocab_size}, got {max(row.prompt_ids)}"
            )
        if row.limit < sampling.min_completion_length:
            raise ValueError(
                f"{row.where}: max_tokens must be >= {sampling.min_completion_length}, the "
                f"sampling.min_completion_length, got {row.limit}; raise it, or lower the minimum"
            )
        if len(row.prompt_ids) + row.limit > model_config.max_position_embeddings:
            raise ValueError(
                f"{row.where}: prompt and completion must fit in the model's {model_config.max_position_embeddings} "
                f"positions, got {len(row.prompt_ids)} + {row.limit} tokens; lower "
                "sampling.max_completion_length or max_tokens"
            )
    if sampling.top_logprobs > model_config.vocab_size:
        raise ValueError(
            f"--top-logprobs must be <= the vocabulary, {model_config.vocab_size}, got {sampling.top_logprobs}"
        )


def output_settings(
    source: WeightSource,
    origin: Origin,
    samples: Sequence[SampleRow],
    sampling: SamplingParams,
    seed: int,
    with_prompt_logprobs: bool,
) -> dict[str, Any]:
    """Everything that decides the lines of an output file, flat and JSON-able: weights, prompts, sampling, seed,
    fields.
    """
    rows = hashlib.sha256()
    for row in samples:
        fields = {name: value for name, value in dataclasses.asdict(row).items() if name != "where"}
        rows.update(json.dumps(fields).encode() + b"\n")
    settings = weight_settings(source, origin) | {"seed": seed}
    settings |= {"prompts": f"{len(samples)} rows, sha256 {rows.hexdigest()}"}
    settings |= draw_settings(source.config, sampling)
    # Files that an older version began have fields of other names, and cannot be gone on with.
    return settings | {"prompt_logprobs": with_prompt_logprobs, "fields": "completion, prompt_ids, num_tokens"}


def weight_settings(source: WeightSource, origin: Origin) -> dict[str, Any]:
    """What decides the weights and the tokenizer, flat and JSON-able."""
    config = source.config
    if source.run is not None:
        digest = hashlib.sha256((source.run / "config.yml").read_bytes())
        model = {"run": read_run(source.run)[1], "run_config": digest.hexdigest(), "step": source.step}
    elif origin.folder is not None:
        names = ("hash", "adapter_hash", "file", "args")
        model = {name: origin.identity[name] for name in names if name in origin.identity}
    else:
        model = {**origin.identity, "arch": str(origin.model_config)}
    if origin.model_config.lora is not None:
        model["lora"] = repr(origin.model_config.lora)
    model |= {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    settings = {f"model.{name}": value for name, value in model.items()}
    return settings | {"tokenizer": config.tokenizer.source or config.model.source}


def draw_settings(config: Config, sampling: SamplingParams) -> dict[str, Any]:
    """What decides, besides weights, prompt and seed, which tokens are drawn; flat and JSON-able."""
    settings = {f"sampling.{name}": value for name, value in dataclasses.asdict(sampling).items()}
    settings |= {
        f"sampling.{name}": getattr(config.sampling, name) for name in ("kv_dtype", "weight_dtype", "weight_group_size")
    }
    if config.sampling.source is not None:
        drawn_by = {name: getattr(config.sampling, name) for name in ("source", "source_args")}
        settings |= {f"sampling.{name}": value for name, value in drawn_by.items()}
        settings |= file_hashes(config, ("sampling.source",))
    return settings


@contextlib.contextmanager
def progress(num_done: int, num_total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr. The yielded function takes the number of tokens of each completion that ended."""
    import rich.console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
        auto_refresh=False,  # drawn when a completion ended, which needs no thread beside jax
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not show,
    )
    start = shown = time.monotonic()
    num_tokens = 0
    with bar:
        task = bar.add_task("", total=num_total, completed=num_done, speed=0.0)
        bar.refresh()

        def advance(tokens: int) -> None:
            nonlocal num_tokens, shown
            num_tokens += tokens
            now = time.monotonic()
            is_due = now - shown >= REFRESH_SECONDS
            shown = now if is_due else shown
            bar.update(task, advance=1, speed=num_tokens / max(now - start, 1e-9), refresh=is_due)

        yield advance
        bar.refresh()


def main(argv: Sequence[str] | None = None) -> int:
    """`grpo sample MODEL --prompts FILE --output FILE [key=value ...]`; the exit status."""
    arguments, model, overrides = parse(sys.argv[1:] if argv is None else list(argv))
    if arguments.replay is not None:
        return replay(*arguments.replay, overrides=overrides, trust=arguments.trust)
    return sample(arguments, model, overrides)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """(options, MODEL, overrides); ValueError for options that contradict each other."""
    parser = argparse.ArgumentParser(prog="grpo sample", description="completions of given prompts")
    parser.add_argument("positional", nargs="*", metavar="MODEL and key=value")
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines, one prompt each")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="one prompt; may be given several times")
    parser.add_argument("--output", metavar="FILE", help="JSON lines to write; with --prompt stdout when left out")
    parser.add_argument("--overwrite", action="store_true", help="start the output file again, whatever it holds")
    parser.add_argument("--step", type=step_option, help="the checkpoint of a run, or best; the newest when left out")
    parser.add_argument("--adapter", metavar="FOLDER", help="an adapter in PEFT's format beside MODEL's weights")
    parser.add_argument("--n", type=int, default=1, help="completions of each prompt that does not say")
    parser.add_argument("--seed", type=int, help="of the draws; the configuration's seed when left out")
    parser.add_argument("--chat", action="store_true", help="text prompts are user messages: data.chat=true")
    parser.add_argument("--system", metavar="TEXT", help="system message: data.system_prompt=TEXT")
    parser.add_argument("--top-logprobs", type=int, default=0, metavar="N", help="the N most likely tokens, too")
    parser.add_argument("--prompt-logprobs", action="store_true", help="log-probs of the prompt's tokens, too")
    parser.add_argument("--replay", nargs=4, metavar=("RUN", "STEP", "PROMPT", "SAMPLE"), help="a rollout's completion")
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
    )
    arguments = parser.parse_intermixed_args(argv)
    positional = arguments.positional
    if arguments.replay is not None:
        given = {name: value for name, value in vars(arguments).items() if value != parser.get_default(name)}
        others = [f"--{name.replace('_', '-')}" for name in given if name not in ("replay", "positional", "trust")]
        if others or any("=" not in text for text in positional):
            raise ValueError(f"--replay takes RUN STEP PROMPT SAMPLE and overrides only, got {[*others, *positional]}")
        return arguments, "", positional
    if not positional:
        raise ValueError("grpo sample needs a MODEL: a run folder, a Hugging Face folder or hub id, or a YAML recipe")
    if (arguments.prompts is None) == (arguments.prompt is None):
        both = "both" if arguments.prompts is not None else "neither"
        raise ValueError(f"grpo sample needs either --prompts FILE or --prompt TEXT, got {both}")
    if arguments.prompts == "":
        raise ValueError("--prompts must be a file, got ''; name one, or give --prompt TEXT")
    if arguments.prompts is not None and arguments.output is None:
        raise ValueError("--prompts needs --output FILE for the completions, got none")
    for name, least in (("n", 1), ("top_logprobs", 0), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    if arguments.seed is not None and arguments.seed > LARGEST_SEED:
        raise ValueError(f"--seed must be <= {LARGEST_SEED}, got {arguments.seed}")
    return arguments, positional[0], positional[1:]


def _given_prompts(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"--prompt {number}", {"prompt": text}) for number, text in enumerate(texts, start=1)]


def _prompt_overrides(arguments: argparse.Namespace) -> list[str]:
    chat = ["data.chat=true"] if arguments.chat else []
    return chat if arguments.system is None else [*chat, f"data.system_prompt={json.dumps(arguments.system)}"]


def _prompt_scores(
    sampler: CompletionSource,
    params: Any,
    samples: Sequence[SampleRow],
    requests: Sequence[Request],
    sampling: SamplingParams,
    chunk_size: int | None,
) -> dict[int, np.ndarray]:
    """Log-probs of the prompts that have requests, by prompt index."""
    numbers = sorted({request.prompt for request in requests})
    prompts = [samples[number].prompt_ids for number in numbers]
    scores = sampler.prompt_logprobs(params, prompts, sampling.temperature, chunk_size)
    return dict(zip(numbers, scores, strict=True))


def _numbers(values: np.ndarray) -> list[float | None]:
    """The shortest numbers in the array's own precision; None for numbers that JSON lacks."""
    return [float(str(value)) if math.isfinite(value) else None for value in values]


def _print_line(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
