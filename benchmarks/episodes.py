"""What turns cost: episodes of several turns beside the same tokens drawn in one go, at several delays between turns.

    python benchmarks/episodes.py [--delays 0,0.05,0.5,2] [--prompts 32] [--samples 8] [--slots 64] [--tiny]

256 episodes on 64 slots by default, of 4 turns of 32 to 64 drawn tokens, with 16 to 48 tokens of observation between
two of them. A delay is the time from the end of a turn to its observation; here nothing computes meanwhile. Beside it
in each round: the same numbers of drawn tokens as completions of one turn (their observations are not read), the
longest episode alone with its delays, and the observations read as prompts. The bar is 1.2 times the longer of the
first two. With the third, they say what it would take if drawing were as fast in turns as without, and observations
were read as fast as prompts. The processor time of the turns over that of drawing in one go says what turns cost on a
machine that others use as well.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import shapes
from command import set_environment
from rich.console import Console
from rich.table import Table
from turns import Call, timed
from weights import Weights

from rl.sampler.contract import Request
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams

BAR = 1.2
READ_BAR = 1.05


class Plan(NamedTuple):
    """The lengths of all episodes: of their turns [B][4], and of the observations between these [B][3]."""

    turns: np.ndarray
    observations: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest episode after its prompt."""
        return int((self.turns.sum(axis=1) + self.observations.sum(axis=1)).max())


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures and prints; returns one result for each delay."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--delays", default="0,0.05,0.5,2", help="seconds from a turn to its observation")
    parser.add_argument("--shape", default="a", help="of benchmarks/shapes.py (default: a)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are shown (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="a model and lengths that only show that it works")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    set_environment()
    console, delays = Console(), [float(delay) for delay in arguments.delays.split(",")]
    config = shapes.CPU_SHAPES[arguments.shape]
    config = shapes.tiny_shape(config) if arguments.tiny else config
    rng = np.random.default_rng(0)
    num_episodes = arguments.prompts * arguments.samples
    low, high = (4, 8) if arguments.tiny else (32, 64)
    plan = Plan(
        rng.integers(low, high + 1, (num_episodes, 4)), rng.integers(low // 2, 3 * high // 4, (num_episodes, 3))
    )
    prompts = [
        rng.integers(0, config.vocab_size, length).tolist() for length in rng.integers(64, 129, arguments.prompts)
    ]
    weights = Weights(config)
    sampling = SamplingParams(max_completion_length=plan.longest + 1)

    def sampler() -> Sampler:
        made = Sampler(
            weights.policy, weights.mesh, weights.shardings, rules=weights.run_config.mesh.rules, slots=arguments.slots
        )
        made.expect_length(128, arguments.prompts, arguments.samples)
        return made

    in_turns, in_one_go = sampler(), sampler()
    num_drawn = int(plan.turns.sum())

    def plain() -> int:
        requests = [
            Request(b // arguments.samples, b // arguments.samples, b % arguments.samples, int(plan.turns[b].sum()))
            for b in range(num_episodes)
        ]
        key = jax.random.key(0)
        return sum(
            len(done.token_ids) for _, done in in_one_go.stream(weights.params, prompts, requests, sampling, key)
        )

    observations = [rng.integers(0, config.vocab_size, int(own.sum())).tolist() for own in plan.observations]
    reader = sampler()

    def read_alone() -> int:
        requests = [Request(b, b, 0, 1) for b in range(num_episodes)]
        return sum(1 for _ in reader.stream(weights.params, observations, requests, sampling, jax.random.key(0)))

    results = []
    with console.status("compiling"):
        in_turns.warm_up_turns(weights.params, arguments.prompts, arguments.samples, sampling, plan.longest)
        in_turns.engine.programs.wait()
        read_alone()
        play(in_turns, weights.params, prompts, arguments.samples, plan, sampling, 0.0)
        plain()
        play(in_turns, weights.params, prompts[:1], 1, plan, sampling, 0.0, longest=plan.longest)
    for delay in delays:
        calls: dict[str, list[Call]] = {"turns": [], "plain": [], "alone": [], "reading": []}
        read = read_again = 0
        for repeat in range(arguments.repeats):
            order = [*calls][repeat % 4 :] + [*calls][: repeat % 4]
            for name in order:
                if name == "turns":
                    session: list[Any] = []
                    calls[name].append(
                        timed(
                            lambda delay=delay, session=session: play(
                                in_turns, weights.params, prompts, arguments.samples, plan, sampling, delay, session
                            )
                        )
                    )
                    read, read_again = session[0].num_read, session[0].num_read_again
                elif name in ("plain", "reading"):
                    calls[name].append(timed(plain if name == "plain" else read_alone))
                else:
                    b = int(plan.turns.sum(axis=1).argmax())
                    one = Plan(plan.turns[b : b + 1], plan.observations[b : b + 1])
                    calls[name].append(
                        timed(
                            lambda delay=delay, one=one: play(
                                in_turns, weights.params, prompts[:1], 1, one, sampling, delay, longest=plan.longest
                            )
                        )
                    )
        medians = {name: float(np.median([call.seconds for call in own])) for name, own in calls.items()}
        cpu = {name: float(np.median([call.cpu_seconds for call in own])) for name, own in calls.items()}
        prompt_tokens = sum(len(prompt) - 1 for prompt in prompts)
        observed = int(plan.observations.sum())
        needed = prompt_tokens + observed  # the last token of a turn is read in place of the observation's last one
        results.append(
            {
                "delay": delay,
                "seconds": medians,
                "cpu_seconds": cpu,
                "ratio": medians["turns"] / max(medians["plain"], medians["alone"]),
                "drawn": num_drawn,
                "read": (prompt_tokens + read + read_again) / needed,
                "read_again": read_again,
                "compiles": [call.num_compiles for call in calls["turns"]],
            }
        )
    table = Table(title=f"{num_episodes} episodes on {arguments.slots} slots, {num_drawn} drawn tokens")
    for column in (
        "delay",
        "in turns",
        "in one go",
        "longest alone",
        "reading",
        f"ratio (bar {BAR})",
        "processor time",
        f"read (bar {READ_BAR})",
    ):
        table.add_column(column)
    for result in results:
        seconds = result["seconds"]
        cells = [
            seconds["turns"],
            seconds["plain"],
            seconds["alone"],
            seconds["reading"],
            result["ratio"],
            result["cpu_seconds"]["turns"] / result["cpu_seconds"]["plain"],
            result["read"],
        ]
        table.add_row(f"{result['delay']:g} s", *(f"{cell:.2f}" for cell in cells))
    console.print(table)
    console.print(f"programs compiled in calls with turns: {[result['compiles'] for result in results]} (must be 0)")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)
    return results


def play(
    sampler: Sampler,
    params: Any,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    plan: Plan,
    sampling: SamplingParams,
    delay: float,
    sessions: list[Any] | None = None,
    longest: int | None = None,
) -> int:
    """Draws all episodes; returns the number of drawn tokens."""
    longest = plan.longest if longest is None else longest
    session = sampler.open(params, sampling, jax.random.key(0), len(prompts), num_samples, longest)
    if sessions is not None:
        sessions.append(session)
    num_episodes, rng = len(prompts) * num_samples, np.random.default_rng(1)
    requests = [
        Request(b // num_samples, b // num_samples, b % num_samples, int(plan.turns[b, 0])) for b in range(num_episodes)
    ]
    places = {number: b for b, number in enumerate(session.submit(prompts, requests))}
    done = [0] * num_episodes
    length = [0] * num_episodes
    waiting: list[tuple[float, int]] = []
    num_drawn = 0
    while session.num_left:
        now = time.perf_counter()
        due = [number for since, number in waiting if now - since >= delay]
        waiting = [entry for entry in waiting if now - entry[0] < delay]
        for number in due:
            b = places[number]
            ids = rng.integers(0, 97, int(plan.observations[b, done[b] - 1]))
            length[b] += len(ids)
            session.go_on(number, ids.tolist(), length[b] + int(plan.turns[b, done[b]]))
        if not session.has_work:
            time.sleep(min(0.001, delay))
        for number, completion in session.poll():
            b = places[number]
            num_drawn += len(completion.token_ids)
            length[b] += len(completion.token_ids)
            done[b] += 1
            if done[b] == 4:
                session.finish(number)
            else:
                waiting.append((time.perf_counter(), number))
    return num_drawn


if __name__ == "__main__":
    main()
