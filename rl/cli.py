"""The console command `grpo`: picks a command, imports its module, and passes on the remaining arguments.

A command is imported only when it is chosen, so `grpo --help` answers at once. Not here: the arguments of a command.
Each module's `main(argv)` reads its own, and `python -m <module>` does the same as the command.
"""

import atexit
import contextlib
import errno
import gc
import importlib
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from rl.errors import TRACEBACK_VARIABLE, exited_in, fail, raised_by_tandem, status_without_stdout

# What can be wrong with a user's path: it is too long, a loop of links, leads through a file, is a folder, or needs
# permission.
_PATH_ERRORS = frozenset(
    {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
)


_SILENT = (
    "doctor",
    "export",
    "checkpoint",
    "lora",
    "rewards",
    "report",
)  # commands that may work for long without a word


class Command(NamedTuple):
    """One command: the module whose `main(argv)` runs it, and its text in `--help`."""

    module: str
    arguments: str
    summary: str
    details: str
    needs_arguments: bool = True  # False: without any it works, too


COMMANDS = {
    "train": Command(
        module="rl.grpo_trainer",
        arguments="CONFIG [--check] [--trust] [--branch FOLDER] [key=value ...]",
        summary="train a policy with GRPO",
        details="""\
            CONFIG      a YAML recipe; it inherits every key it does not state from configs/base.yml. Or a run folder,
                        whose run is resumed where it is
            --check     do everything before the first compilation (configuration, data, tokenizer, headers of the
                        weights, reward functions, memory, disk space, run folder), say what the run would do, and
                        stop; nothing on disk changes except caches of downloads and of `datasets`
            --trust     take a run folder whose config.yml was edited, or whose code is not shown to be yours
            --branch FOLDER
                        of a run folder CONFIG: go on from its last checkpoint in a new folder, where the learning rate
                        and some other keys may change; the old run stays as it is
            key=value   overrides with dotted keys, for example grpo.steps=100 optimizer.lr=1e-6

            The run folder is output_dir. The same command again resumes the run where its last checkpoint left it.""",
    ),
    "sft": Command(
        module="rl.sft_trainer",
        arguments="CONFIG [--check] [--trust] [--branch FOLDER] [key=value ...]",
        summary="warm-start a policy on prompt and completion rows",
        details="""\
            CONFIG      a YAML recipe; the sft section says how long and on which column. Or a run folder, whose run
                        is resumed where it is
            --check     do everything before the first compilation (configuration, data, tokenizer, headers of the
                        weights, reward functions, memory, disk space, run folder), say what the run would do, and
                        stop; nothing on disk changes except caches of downloads and of `datasets`
            --trust     take a run folder whose config.yml was edited, or whose code is not shown to be yours
            --branch FOLDER
                        of a run folder CONFIG: go on from its last checkpoint in a new folder, where the learning rate
                        and some other keys may change; the old run stays as it is
            key=value   overrides with dotted keys, for example sft.steps=300 optimizer.lr=1e-3

            The run folder is output_dir. The same command again resumes the run where its last checkpoint left it.""",
    ),
    "doctor": Command(
        module="rl.tools.doctor.doctor",
        arguments="[CONFIG] [--trust] [key=value ...]",
        summary="whether a run would start and fit here, and what to change",
        details="""\
            CONFIG      a YAML recipe of `grpo train`, or a run folder; without it devices, versions, memory, disk and
                        optional packages are looked at. With it also tokenizer and chat template, the start, the
                        reward functions, memory, and one step, in memory: whether sampler and trainer agree
            --trust     take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value   overrides with dotted keys, for example grpo.group_size=16

            Each line is ok, note, change (the run starts, and would be better otherwise) or wrong, with the key to
            change. Nothing on disk changes except caches of downloads, of `datasets` and of compiled programs.
            Exit status 0: a run would start and fit; 1: it would not.""",
        needs_arguments=False,
    ),
    "eval": Command(
        module="rl.tools.evaluate",
        arguments=(
            "MODEL [CONFIG] [--step N] [--output FILE] [--against B] [--adapter FOLDER] [--trust] [key=value ...]"
        ),
        summary="accuracy on held-out rows and named sets",
        details="""\
            MODEL            a run folder (its newest checkpoint), a YAML recipe (the weights of model.source), or a
                             Hugging Face folder or hub id with data and rewards as key=value
            CONFIG           a YAML recipe that says what is asked and how it is judged; MODEL's own when left out
            --step N         the checkpoint of a run, or best; the newest when left out
            --output FILE    JSON lines to write: every sample with its prompt and rewards
            --against B      another model, which is asked the same, or two FILEs that --output wrote in place of both
                             models: the numbers are compared question by question. FILE gets the questions on which
                             they differ
            --against-step N the checkpoint of the run B, or best
            --adapter FOLDER an adapter in PEFT's format beside the weights; not for a run, which has its own
            --trust          take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value        overrides with dotted keys, for example eval.max_prompts=200""",
    ),
    "sample": Command(
        module="rl.tools.samples.sample",
        arguments="MODEL --prompts FILE --output FILE [key=value ...]",
        summary="draw completions of given prompts",
        details="""\
            MODEL            a run folder (its newest checkpoint), a folder that `grpo export` wrote, a hub id, or a
                             YAML recipe (the weights of model.source)
            --prompts FILE   JSON lines, each with one of prompt (text or chat messages), messages, prompt_ids
                             (token ids), and if wanted n, max_tokens, seed and id; other columns are copied
            --prompt TEXT    one prompt, in place of a file; may be given several times
            --output FILE    JSON lines to write, one per completion as it ends; with --prompt stdout when left out.
                             The same command again finishes a file that was stopped
            --overwrite      start the output file again
            --n N            completions of each prompt that has no n of its own; 1 when left out
            --seed N         of the draws; the configuration's seed when left out
            --step N         the checkpoint of a run, or best; the newest when left out
            --adapter FOLDER an adapter in PEFT's format beside the weights of a Hugging Face folder, hub id or recipe
            --chat           wrap a text prompt as a user message in the tokenizer's chat template (data.chat=true)
            --system TEXT    the system message (data.system_prompt=TEXT)
            --top-logprobs N     add the N most likely tokens of each position, as [token id, log-prob], best first
            --prompt-logprobs    add the log-probs of the prompt's tokens; null for the first, which has none
            --replay RUN STEP PROMPT SAMPLE
                             in place of MODEL and prompts: draw one completion of a training run again, numbered as in
                             its samples.jsonl, print it as JSON, and compare; needs the checkpoint of the step before.
                             Of a run with environments: play the recorded turns to a fresh environment. Exit status 1
                             where samples.jsonl has other tokens, or other answers of the environment
            --trust          take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value        overrides with dotted keys, for example sampling.temperature=0.7 sampling.top_p=0.9

            Log-probs are at sampling.temperature, and at temperature 1 when that is 0 (greedy).""",
    ),
    "serve": Command(
        module="rl.tools.serve",
        arguments="MODEL [--port N] [--host ADDRESS] [key=value ...]",
        summary="an OpenAI-compatible endpoint for a model",
        details="""\
            MODEL            a run folder (its newest checkpoint), a folder that `grpo export` wrote, a hub id, or a
                             YAML recipe (the weights of model.source)
            --host ADDRESS   to listen at; 127.0.0.1 when left out: this machine alone. Another one needs an API key in
                             the environment variable GRPO_API_KEY
            --port N         8000 when left out; 0: any free one. The address is printed when the server is ready
            --name NAME      what clients call the model; MODEL when left out
            --step N         the checkpoint of a run, or best; the newest when left out
            --adapter FOLDER an adapter in PEFT's format beside the weights of a Hugging Face folder, hub id or recipe
            --seed N         of completions whose request has no seed; another at each start when left out
            --parked N       completions whose keys and values are kept for prompts that go on from them; 8 when left
                             out
            --conversations N   chats whose tokens are remembered: a chat that goes on from one keeps the very tokens
                             that were drawn, which its template may write otherwise; 0 when left out: none
            --queue N        completions that may wait for a slot; 256 when left out
            --chunk N        tokens decoded between two looks, and sent at a time in a stream; 8 when left out
            --top-logprobs N the most likely tokens that a request may ask for; 5 when left out
            --timeout S      seconds that a request may take; 600 when left out
            --drain S        seconds for what is running when the server is stopped; 30 when left out
            --max-body-bytes N   of a request; 4000000 when left out
            --record FILE    JSON lines to write, one for each call that was answered
            --trust          take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value        overrides with dotted keys: sampling.slots (completions at a time, 16 when null),
                             data.max_prompt_length and sampling.max_completion_length (tokens of each)

            Needs the extra `serve`: pip install 'tandem-grpo[serve]'. Ctrl-C or SIGTERM stops it when what runs has
            ended. docs/serving.md tells the rest.""",
    ),
    "compile": Command(
        module="rl.tools.programs.compile",
        arguments=(
            "CONFIG [--topology T [--slices N] | --devices cpu:N] [--save FILE] [--json FILE] [--trust] [key=value ...]"
        ),
        summary="compile a run ahead of time and say whether it fits",
        details="""\
            CONFIG         a YAML recipe; neither weights nor data are read
            --topology T   TPUs that need not be there: v5e:8x8, v5p:8x16x16, v6e:16x16, v4:2x2x1, ...; needs libtpu
                           (pip install "tandem-grpo[aot]") and no TPU
            --slices N     that many of them, joined by the data center network
            --devices cpu:N  virtual CPU devices; without this and --topology the devices at hand
            --save FILE    write the compiled programs; training takes them with compiled_file=FILE
            --json FILE    write the report
            --trust        take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value      overrides with dotted keys, for example mesh.tensor=8 model.remat=block

            Exit status 0: the run fits; 1: it does not.""",
    ),
    "export": Command(
        module="rl.tools.checkpoints.export",
        arguments="RUN OUT [--step N] [--format FORMAT] [--dtype DTYPE] [--no-remainder] [--adapter] [--trust]",
        summary="write a run's weights as a folder of their own",
        details="""\
            RUN              a run folder
            OUT              the folder to write, new or empty; it appears when all of it was read back
            --step N         the checkpoint to export, or best; the newest when left out
            --format FORMAT  huggingface (when left out): transformers, TRL and vLLM open it; params: a parameter-only
                             checkpoint as Orbax writes it, not of a Tunix model or a module of your own. model.source
                             takes both
            --dtype DTYPE    float32, bfloat16 or float16; the checkpoint's own when left out
            --adapter        of a run with adapters (lora.rank): these alone, in PEFT's format; else they are merged
            --no-remainder   of merged adapters: leave out lora_remainder.npz, with which `grpo lora unmerge` gives the
                             base back bit for bit
            --trust          take a run folder whose config.yml was edited, or whose code is not shown to be yours
                             (docs/security.md)""",
    ),
    "checkpoint": Command(
        module="rl.tools.checkpoints.checkpoint",
        arguments="inspect | verify | convert | bench ...",
        summary="look into, check, convert and time checkpoints",
        details="""\
            inspect CHECKPOINT [--step N]
                what it holds: arrays with types, shapes and bytes, step, who wrote it, loop record, adapter settings
            verify CHECKPOINT [--step N] [--write FILE] [--against FILE]
                compares its files with the hashes written with them, reads every array, looks for numbers that are not
                finite, and compares with what the run's configuration wants; prints a content hash per array. Exit
                status 1 when something is wrong; a damaged file is named
            convert RUN OUT
                a run of an older version as one that this version resumes
            convert CHECKPOINT OUT --like MODEL [--dtype DTYPE] [--rope interleaved|halves]
                weights that MaxText wrote (Linen or NNX) as a Hugging Face folder; MODEL has config.json and tokenizer
            bench RUN_OR_CONFIG [--steps N] [--json FILE] [key=value ...]
                saves and restores the state N times (3 when left out): seconds and GB/s; the files are removed;
                --json FILE has the same numbers

            CHECKPOINT     a run folder (its newest checkpoint, or --step N), or any folder that Orbax wrote
            --write FILE   the content hashes as JSON; --against FILE compares with such a file
            --trust        of verify and bench: take a run folder whose config.yml was edited, or whose code is not
                           shown to be yours
                           (docs/security.md); without it verify leaves the comparison with the configuration out""",
    ),
    "data": Command(
        module="rl.tools.data",
        arguments="bench | passrate ...",
        summary="time a run's prompts, or measure how hard they are",
        details="""\
            bench CONFIG [--steps N] [--json FILE]
                reads, filters and tokenises the prompts as training does, without model or device: rows and tokens
                per second, what was kept and dropped, lengths, memory
            passrate MODEL CONFIG --output FILE [--draws N] [--step N] [--adapter FOLDER] [--overwrite]
                draws N completions of each training prompt, judges them with the recipe's reward functions, and
                writes the data with the columns pass_rate and pass_rate_draws, for data.curriculum.by=pass_rate. The
                same command again goes on where it was stopped; FILE appears when all is measured

            CONFIG           a YAML recipe
            --steps N        of how many steps the rows are chosen; 10 when left out
            --json FILE      write the same numbers
            MODEL            a run folder (its newest checkpoint), a Hugging Face folder or hub id, or a YAML recipe
                             (the weights of model.source), CONFIG itself too
            --output FILE    .jsonl or .parquet; {source} in its name makes a file for each source of a mixture
            --draws N        completions of each prompt; grpo.group_size when left out
            --step N         of passrate: the checkpoint of a run, or best; the newest when left out
            --adapter FOLDER an adapter in PEFT's format beside the weights; not for a run, which has its own
            --overwrite      replace FILE, and drop what a stopped command with other settings has measured
            --trust          take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value        overrides with dotted keys, for example data.max_prompt_length=512""",
    ),
    "launch": Command(
        module="rl.tools.launch",
        arguments="--processes N [--cpu-devices K] -- COMMAND ...",
        summary="run a command as several processes on this machine",
        details="""\
            --processes N      how many; they train one policy together
            --cpu-devices K    virtual CPU devices of each; whatever devices jax finds when left out
            COMMAND ...        train, sft, eval or data passrate with its arguments

            When a process dies, says which one was first, ends the others, and returns 1. The same train or sft again
            resumes the run. For several machines see examples/launch.""",
    ),
    "lora": Command(
        module="rl.tools.checkpoints.lora",
        arguments="extract|merge|unmerge|inspect|convert ...",
        summary="take adapters out of runs, put them into weights, look at them",
        details="""\
            extract RUN OUT [--step N]          a run's adapter as a folder in PEFT's format
            merge MODEL ADAPTER OUT             MODEL + ADAPTER as a Hugging Face folder
            unmerge MODEL ADAPTER OUT           MODEL - ADAPTER: the base that MODEL was merged from, bit for bit
            inspect ADAPTER_OR_RUN [--step N] [--json]
                                                rank, alpha, base, dtype, parameters, and norms of each matrix
            convert RUN OUT                     the same as extract
            convert ADAPTER RUN RECIPE          a run folder with the adapter as its checkpoint 0, which grpo train
                                                goes on from

            MODEL          a Hugging Face folder, a hub id, or a YAML recipe (the weights of model.source)
            ADAPTER        a folder in PEFT's format; rank, alpha and targets are its own
            OUT, RUN       what is written: new or empty, and there at once and whole
            --dtype DTYPE  of merge and unmerge: float32, bfloat16 or float16; MODEL's own when left out
            --no-remainder of merge: leave out lora_remainder.npz, what rounding took away; unmerge is then exact to a
                           unit in the last place
            --trust        take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value      overrides of merge, unmerge and convert, for example tokenizer.source=byte""",
    ),
    "quantize": Command(
        module="rl.tools.quantization.quantize",
        arguments="MODEL OUT [--dtype DTYPE] [--group-size N] [--text FILE] ... [key=value ...]",
        summary="write a model's matrices in 8 or 4 bits, layer by layer",
        details="""\
            MODEL              a Hugging Face folder or hub id, of any size: one layer is in memory at a time;
                               or tunix:FOLDER, or path/to/file.py:build, or a YAML recipe of such a model
            OUT                the folder to write, new or empty; model.source takes it: for sampling, evaluation, QLoRA
                               (tunix:OUT of a Tunix model, model.weights=OUT of a module of your own; no QLoRA there)
            --dtype DTYPE      int8 (when left out), int4 or float8_e4m3fn
            --group-size N     inputs of an output that share a scale; all of them when left out. int4 wants 32 to 128
            --only REGEX       the matrices to quantise, for example 'mlp/.*/kernel'; may be given several times. All of
                               attention and MLP when left out
            --head             also what gives the logits: lm_head, or the embedding table where it is tied
            --text FILE        measure the perplexity of a text before and after, and the error of hidden states
            --max-tokens N     of the text that are read; 8192 when left out
            --context N        tokens that the model sees of it at a time; 512 when left out
            --tokenizer SOURCE a folder, a hub id or byte; MODEL when left out
            --trust            take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value          overrides of a recipe, a Tunix model or a module of your own

            Prints the relative error of each layer, sizes, and the peak memory of the process.""",
    ),
    "rewards": Command(
        module="rl.tools.rewards",
        arguments="check CONFIG [--rows N] [--samples RUN] [--json FILE] [--trust] [key=value ...]",
        summary="try a recipe's reward functions without training",
        details="""\
            check          runs the reward functions on right answers in usual formats, another row's answer, a list
                           of answers, nothing, junk, the prompt, and reasoning that is cut off: mean rewards, seconds,
                           failures
            CONFIG         a YAML recipe; no weights are read and nothing is drawn
            --rows N       data rows at most; 16 when left out
            --samples RUN  judge the newest completions in the samples.jsonl of this run, too
            --json FILE    write the same numbers
            --trust        take a run folder whose config.yml was edited, or whose code is not shown to be yours
            key=value      overrides with dotted keys, for example data.source=train.jsonl

            Exit status 0; 1 where a right answer, the column `answer`, does not score above junk.""",
    ),
    "report": Command(
        module="rl.tools.report.report",
        arguments="RUN [RUN ...] [--output FILE] [--watch]",
        summary="show runs as a page, and print their summary",
        details="""\
            RUN            one or more run folders, compared with each other
            --output FILE  the page to write (.html), or the curves as a picture (.png, .pdf, .svg); report.html in the
                           first run folder when left out
            --samples N    samples of each run in the page; of more, whole steps are left out. 1600 when left out
            --watch        serve the page on this machine (127.0.0.1) and follow the runs while they train; writes no
                           file, and Ctrl-C ends it
            --port N       of --watch; any free port when left out: the address is printed

            The page is one file that needs no network: curves, times of phases, distributions, samples with the values
            of their tokens, warnings, configuration and environment.""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments after the program's name; `sys.argv[1:]` when None.

    Returns:
      The exit status: 0, or the result of the command's `main`. 2 for a user's error, printed without a traceback
      unless `--traceback` is given or GRPO_TRACEBACK is set; also where stdout cannot be written, on a full disk for
      instance. 130 after Ctrl-C and 141 when the reader of stdout is gone, like a shell for a process that a signal
      ended.

    Raises:
      ValueError: an error that no code of Tandem raised. It is a bug and not a user's error, so its traceback is
        needed.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    # After the last word the interpreter would look through all that was imported for garbage, for seconds.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    stdout = sys.stdout
    sys.stdout = _Output(stdout)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except OSError as error:
        status = status_without_stdout(error)
        if status is None:
            raise
        return status
    finally:
        sys.stdout = stdout


class _Output:
    """A stream that remembers the error with which it failed."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._remembering():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._remembering():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise


def _run(arguments: list[str]) -> int:
    show_traceback = "--traceback" in arguments or bool(os.environ.get(TRACEBACK_VARIABLE))
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from importlib import metadata  # half of the time of --help, which does without

        print(f"tandem-grpo {metadata.version('tandem-grpo')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return fail(_unknown_command(name))
    if not rest and COMMANDS[name].needs_arguments:
        print(_command_help(name), file=sys.stderr)
        return 2
    if "-h" in rest or "--help" in rest:
        print(_command_help(name))
        return 0
    try:
        with _alive(name, rest):
            return importlib.import_module(COMMANDS[name].module).main(rest) or 0
    except ValueError as error:
        if not raised_by_tandem(error):
            raise
        if show_traceback:
            traceback.print_exc()
        return fail(str(error))
    except OSError as error:
        if error.errno not in _PATH_ERRORS or error.filename is None:
            raise
        if show_traceback:
            traceback.print_exc()
        path = str(error.filename)
        shown = path if len(path) <= 160 else f"{path[:150]}..."
        return fail(f"{shown!r} must be a path that can be used: {error.strerror}; name another one")
    except SystemExit as error:  # in a user's model, loss or other code, whose 0 would look like a run that is complete
        if (place := exited_in(error)) is None:
            raise
        if show_traceback:
            traceback.print_exc()
        return fail(f"code of the run must not exit, got SystemExit: {error} at {place}")
    except KeyboardInterrupt:
        return 130


def _alive(name: str, arguments: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """A context in which a command that says nothing while it works says from time to time that it goes on."""
    if name not in _SILENT or "--watch" in arguments:  # a server says where it is, and is silent on purpose then
        return contextlib.nullcontext()
    from rl.run.heartbeat import heartbeat

    return heartbeat(lambda text: print(text, file=sys.stderr, flush=True), f"grpo {name}")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""\
usage: grpo COMMAND [ARGUMENT ...]

Tandem: GRPO post-training in JAX, with interchangeable Linen and NNX policies.

commands:
{commands}

options:
  --help       this text; `grpo COMMAND --help` for one command
  --version    the installed version
  --traceback  show where an error came from (or set {TRACEBACK_VARIABLE}=1)"""


def _command_help(name: str) -> str:
    command = COMMANDS[name]
    details = textwrap.indent(textwrap.dedent(command.details), "  ")
    return f"usage: grpo {name} {command.arguments}\n\n{command.summary}\n\n{details}"


def _unknown_command(name: str) -> str:
    import difflib

    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"unknown command {name!r}; {hint}Commands: {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
