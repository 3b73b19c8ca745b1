"""`grpo doctor`: whether a run would start and fit on this machine, and what to change.

In: nothing, or a recipe. Out: a line for each finding (`rl.tools.doctor.findings`), and a verdict. What other commands
check is checked by them: the start (`grpo train --check`), reward functions (`grpo rewards check`), memory
(`grpo compile`). Nothing on disk changes but caches of downloads, of `datasets` and of compiled programs.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import jax

from rl.config.load import Config
from rl.data.prompt_rows import PromptRow
from rl.data.prompts import load_prompts
from rl.devices import hosts
from rl.devices.host_memory import available_bytes
from rl.devices.programs import use_compilation_cache
from rl.errors import raised_by_tandem
from rl.grpo_trainer import train
from rl.run_folder.folder import check_trust, load_run_config
from rl.state.origin import tokenizer_from_config
from rl.tools.doctor.dry_step import DryStep, dry_step
from rl.tools.doctor.findings import Finding, size_text
from rl.tools.doctor.machine import machine_findings
from rl.tools.doctor.tokens import token_findings
from rl.tools.programs.compile import compile_config
from rl.tools.programs.compile_advice import advice
from rl.tools.rewards import check, report

_PARITY = {"float32": 1e-5, "float64": 1e-5}  # nats per token, of logprob_difference/mean
_PARITY_ROUNDED = 0.02  # in bfloat16 and float16
_ROWS = 16  # prompts that are looked at, and on which reward functions are tried
_MEMORY_KEYS = "lower grpo.max_tokens_per_microbatch, sampling.slots or sampling.kv_memory, or cut over more devices"


class Doctor:
    """Tries one recipe, check after check, and says each finding as it comes.

    Args:
      path, overrides: as on the command line, for `grpo rewards check`.
      tell: takes a line.
    """

    def __init__(
        self, config: Config, path: str, overrides: Sequence[str], trust: bool, tell: Callable[[str], None]
    ) -> None:
        self._config, self._path, self._overrides, self._trust, self._tell = config, path, overrides, trust, tell
        self._said: set[str] = set()  # what findings said: one cause may stop several checks
        self.num = {"ok": 0, "note": 0, "change": 0, "wrong": 0}

    def say(self, *findings: Finding) -> None:
        """Says what was found, once."""
        for finding in findings:
            said = finding.value.partition(", which does not exist")[0]  # hints differ
            if said not in self._said:
                self._said.add(said)
                self.num[finding.degree] += 1
                self._tell(finding.line)

    def examine(self) -> None:
        """All checks that need a recipe. A step is made only of a run that starts and fits."""
        with self._trying("tokenizer"):
            self._tokens()
        with self._trying("start"):
            self._start()
        with self._trying("rewards"):
            self._rewards()
        with self._trying("memory"):
            self._memory()
        if self.num["wrong"]:
            self.say(Finding("note", "dry step", "not made, because of what is wrong above"))
            return
        with self._trying("dry step"):
            self._step()

    @contextlib.contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """A context for a check: a user's error, or too little memory, is a finding."""
        try:
            yield
        except ValueError as error:
            if not raised_by_tandem(error):
                raise
            self.say(Finding("wrong", what, str(error)))
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            said = str(error).splitlines()[0][:200] if str(error) else "out of memory"
            self.say(Finding("wrong", what, f"does not fit: {said}", _MEMORY_KEYS))

    def _tokens(self) -> None:
        tokenizer = tokenizer_from_config(self._config)
        rows: list[PromptRow] = []
        with contextlib.suppress(ValueError):  # of the data, which the start names
            rows = list(load_prompts(self._config, tokenizer).train[:_ROWS])
        self.say(*token_findings(self._config, tokenizer, rows))

    def _start(self) -> None:
        quiet = dataclasses.replace(self._config.logging, quiet=True)
        config = dataclasses.replace(self._config, logging=quiet)  # pyright: ignore[reportArgumentType]
        with self._listening("start") as last_words:
            train(config, check_only=True, trust=self._trust)
        self.say(*(Finding("ok", "start", text) for text in last_words))

    def _rewards(self) -> None:
        if not self._config.rewards.functions:
            self.say(Finding("note", "rewards", "no function to try: the environment or the agent rewards"))
            return
        checked = check(self._path, _ROWS, None, self._overrides, self._trust)
        self.say(*(Finding("change", "rewards", problem) for problem in checked.problems))
        if checked.verdict is None:
            self.say(Finding("ok", "rewards", report(checked)[-1]))
        elif checked.is_wrong:
            self.say(Finding("change", "rewards", checked.verdict))
        else:
            self.say(Finding("note", "rewards", checked.verdict))

    def _memory(self) -> None:
        if self._config.rollout.has_turns:
            self.say(Finding("note", "memory", "not estimated for episodes; the dry step measures it"))
            return
        compiled = compile_config(self._config)
        worst, memory = compiled.worst, compiled.loop.memory
        terms = ", ".join(f"{name} {size_text(size)}" for name, size in list(compiled.terms().items())[:3])
        need = f"{worst.name} needs {size_text(worst.needed)} of the {size_text(memory)} of a device; largest: {terms}"
        if not compiled.fits:
            refused = f" (the compiler: {worst.refused})" if worst.refused else ""
            self.say(Finding("wrong", "memory", f"{need}{refused}", _MEMORY_KEYS))
            self.say(*(Finding("change", "memory", line) for line in advice(compiled)))
            return
        self.say(Finding("ok", "memory", need))
        total, available = worst.needed * jax.local_device_count(), available_bytes()
        if compiled.loop.mesh.devices.flat[0].platform == "cpu" and available and total > available:
            value = (
                f"{size_text(total)} are needed, and other programs leave {size_text(available)} of the host's memory"
            )
            self.say(Finding("change", "memory", value, f"end some of them, or {_MEMORY_KEYS}"))

    def _step(self) -> None:
        with self._listening("dry step"):
            step = dry_step(self._config)
        self.say(*step_findings(self._config, step))

    @contextlib.contextmanager
    def _listening(self, what: str) -> Iterator[list[str]]:
        """A context that turns the warnings of a run's console into findings. Gives what else it says, when it ends."""
        output, last_words = io.StringIO(), []
        with contextlib.redirect_stdout(output):
            yield last_words
        for text in output.getvalue().splitlines():
            if text.startswith("warning: "):
                self.say(Finding("change", what, text.removeprefix("warning: ")))
            elif text.strip():
                last_words.append(text)


def step_findings(config: Config, step: DryStep) -> list[Finding]:
    """What a step shows: its numbers, whether sampler and trainer agree, and what a run would warn of."""
    metrics = step.metrics
    names = {"reward/mean": "reward", "completion_length/mean": "tokens a completion", "truncated_share": "truncated"}
    shown = [f"{label} {metrics[name]:.3g}" for name, label in names.items() if name in metrics]
    time = f"{step.seconds:.0f} s with compilation, peak memory {size_text(step.peak_bytes)}"
    if metrics["skipped_updates"]:
        found = [Finding("wrong", "dry step", "; ".join(step.warnings[:1]) or "its update was skipped")]
    else:
        found = [Finding("ok", "dry step", ", ".join([time, *shown]))]
    if (difference := metrics.get("logprob_difference/mean")) is not None:
        largest, limit = metrics.get("logprob_difference/max"), _PARITY.get(config.model.dtype, _PARITY_ROUNDED)
        value = f"log-probs differ by {difference:.2g} on the mean, {largest:.2g} at most, in {config.model.dtype}"
        if difference <= limit:
            found.append(Finding("ok", "sampler against trainer", value))
        else:
            way_out = "set grpo.sampler_is_correction=true, or model.dtype=float32"
            found.append(Finding("change", "sampler against trainer", f"{value}, above {limit:g}", way_out))
    return [*found, *(Finding("change", "dry step", warning) for warning in step.warnings)]


def main(argv: Sequence[str] | None = None) -> int:
    """`grpo doctor [CONFIG] [--trust] [key=value ...]`.

    Returns 1 where something is wrong: a run would not start, or not fit; else 0.
    """
    parser = argparse.ArgumentParser(prog="grpo doctor", description=__doc__)
    parser.add_argument("config", nargs="?", default=None, help="a YAML recipe, or a run folder")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
    )
    arguments = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    if arguments.config is None:
        findings = machine_findings()
        print("\n".join(finding.line for finding in findings))
        return int(any(finding.degree == "wrong" for finding in findings))
    if re.fullmatch(r"[\w.]+=.*", arguments.config, re.DOTALL) and not os.path.exists(arguments.config):
        raise ValueError(f"grpo doctor needs a config file before overrides, got {arguments.config!r}")
    sys.dont_write_bytecode = True  # of a user's modules
    config = load_run_config(arguments.config, arguments.overrides)
    with hosts.joined(config.distributed):
        check_trust(arguments.config, config, arguments.overrides, trust=arguments.trust)
        use_compilation_cache(config)
        stream = hosts.console_stream()

        def tell(line: str) -> None:
            print(line, file=stream, flush=True)

        doctor = Doctor(config, arguments.config, arguments.overrides, arguments.trust, tell)
        doctor.say(*machine_findings(config.output_dir))
        doctor.examine()
        num = doctor.num
        verdict = "the run would not start and fit" if num["wrong"] else "the run would start and fit"
        tell(f"{verdict}: {num['wrong']} wrong, {num['change']} to change, {num['note']} to note")
    return int(bool(num["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
