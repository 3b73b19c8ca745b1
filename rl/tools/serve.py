"""An OpenAI-compatible endpoint for a model: `grpo serve MODEL [--port N] [key=value ...]`.

In: a model (run folder, Hugging Face folder or hub id, recipe). Out: a server on this machine, until Ctrl-C or SIGTERM.
Not here: the interface (`rl.serving.app`), drawing (`rl.serving.engine`).
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from rl.config.load import Config
from rl.config.ranges import LARGEST_SEED
from rl.devices.programs import use_compilation_cache
from rl.files.output_file import check_writable
from rl.sampler.create import create_sampler, eos_ids, sampling_params
from rl.serving.engine import Engine, EngineLimits
from rl.tools.step_option import step_option
from rl.tools.trained import load_source, resolve_model, with_step

DEFAULT_SLOTS = 16
KEY_VARIABLE = "GRPO_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None) -> int:
    """`grpo serve MODEL [options] [key=value ...]`; the exit status."""
    arguments, model, overrides = parse(sys.argv[1:] if argv is None else list(argv))
    return serve(arguments, model, overrides)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """(options, MODEL, overrides); ValueError for options that cannot be."""
    parser = argparse.ArgumentParser(prog="grpo serve", description="an OpenAI-compatible endpoint for a model")
    parser.add_argument("positional", nargs="*", metavar="MODEL and key=value")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed")
    parser.add_argument("--name", help="what clients call the model; MODEL when left out")
    parser.add_argument("--step", type=step_option, help="the checkpoint of a run, or best; the newest when left out")
    parser.add_argument("--adapter", metavar="FOLDER", help="an adapter in PEFT's format beside MODEL's weights")
    parser.add_argument("--seed", type=int, help="of completions whose request has none; another at each start")
    parser.add_argument("--parked", type=int, default=8, help="completions whose keys and values are kept")
    parser.add_argument("--conversations", type=int, default=0, help="chats whose tokens are remembered")
    parser.add_argument("--queue", type=int, default=256, help="completions that may wait for a slot")
    parser.add_argument("--chunk", type=int, default=8, help="tokens decoded between two looks")
    parser.add_argument("--top-logprobs", type=int, default=5, help="the most that a request may ask for")
    parser.add_argument("--record", metavar="FILE", help="a file of JSON lines, one for each call that was answered")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a request")
    parser.add_argument("--drain", type=float, default=30.0, help="seconds for what runs when the server is stopped")
    parser.add_argument("--max-body-bytes", type=int, default=4_000_000, help="of a request")
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and its code, as they are"
    )
    arguments = parser.parse_intermixed_args(argv)
    positional = arguments.positional
    if not positional or "=" in positional[0]:
        raise ValueError("grpo serve needs a MODEL: a run folder, a Hugging Face folder or hub id, or a YAML recipe")
    least = {
        "port": 0,
        "parked": 0,
        "conversations": 0,
        "queue": 0,
        "chunk": 1,
        "top_logprobs": 0,
        "max_body_bytes": 1000,
        "seed": 0,
    }
    most = {"port": 65535, "chunk": 256, "top_logprobs": 100, "seed": LARGEST_SEED}
    for name in {**least, **most}:
        value, low, high = getattr(arguments, name), least[name], most.get(name, 2**31 - 1)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
    for name in ("timeout", "drain"):
        if not 0 < getattr(arguments, name) < 1e9:
            raise ValueError(f"--{name} must be seconds, more than 0, got {getattr(arguments, name)}")
    return arguments, positional[0], positional[1:]


def serve(arguments: argparse.Namespace, model: str, overrides: Sequence[str]) -> int:
    """Runs the command. Returns the exit status: 1 where requests were cut off at the end, or the engine failed."""
    api_key = os.environ.get(KEY_VARIABLE) or None
    is_local = arguments.host in LOOPBACK
    if not is_local and api_key is None:
        raise ValueError(
            f"--host must be one of {', '.join(LOOPBACK)} without an API key, got {arguments.host!r}: everybody who "
            f"reaches it could use the model; put a key into the environment variable {KEY_VARIABLE} (docs/security.md)"
        )
    try:
        from rl.serving.app import ServerLimits, create_app
        from rl.serving.call_file import CallFile
        from rl.serving.server import open_socket
        from rl.serving.server import serve as serve_app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise ValueError(
            f"grpo serve needs {error.name}, which is not installed: pip install 'tandem-grpo[serve]'"
        ) from None
    source = with_step(resolve_model(model, overrides, arguments.step, arguments.adapter, trust=arguments.trust), _say)
    config = source.config
    config.rollout.refuse_turns("grpo serve")
    if config.sampling.source is not None:
        raise ValueError("sampling.source must be null for grpo serve, which draws with the weights of MODEL itself")
    use_compilation_cache(config)
    check_writable(arguments.record, "--record")
    opened = open_socket(arguments.host, arguments.port)
    with contextlib.closing(opened), contextlib.ExitStack() as stack:
        trained = load_source(source)
        if trained.policy.decodes_in_waves:
            raise ValueError("grpo serve needs a model of the toolkit's own decoder, got one that decodes in waves")
        limits = engine_limits(config, arguments)
        # Special tokens are text to a stop string, because a client may name one.
        where = trained.policy, trained.mesh, trained.shardings, trained.tokenizer
        sampler = stack.enter_context(contextlib.closing(create_sampler(config, *where, shows_special=True)))
        sampling = sampling_params(config, eos_ids(config, trained.origin.model_config, trained.tokenizer))
        sampling = dataclasses.replace(sampling, top_logprobs=arguments.top_logprobs, stop_strings=())
        engine = Engine(sampler, sampling, limits, config.grpo.logprob_chunk)
        engine.warm_up(trained.params)
        engine.start(trained.params, arguments.seed)
        name = arguments.name or str(model)
        server_limits = ServerLimits(arguments.max_body_bytes, arguments.timeout)
        hosts = LOOPBACK if is_local and api_key is None else None
        record = None if arguments.record is None else stack.enter_context(CallFile(arguments.record, _say))
        more = {"on_call": record, "most_conversations": arguments.conversations}
        app = create_app(engine, trained.tokenizer, name, server_limits, api_key, hosts, **more)
        host, port = opened.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        notes = [f"serving {name!r} at http://{shown}:{port}/v1"]
        notes.append(
            f"{limits.num_slots} completions at a time, prompts of up to {limits.max_prompt_tokens} tokens, "
            f"completions of up to {limits.max_tokens}"
        )
        is_whole = serve_app(app, engine, opened, arguments.drain, lambda: _say("\n".join(notes)))
    if engine.failure is not None:
        _say(f"stopped, because the engine failed: {engine.failure}")
        return 1
    _say("stopped" if is_whole else "stopped; requests that were running were cut off")
    return 0 if is_whole else 1


def engine_limits(config: Config, arguments: argparse.Namespace) -> EngineLimits:
    """The limits of a configuration, and of the options of the command."""
    num_slots = config.sampling.slots or DEFAULT_SLOTS
    max_tokens = config.sampling.max_completion_length
    longest = config.rollout.max_episode_tokens
    if longest is None:
        longest = 2 * max_tokens if arguments.parked else max_tokens
    if longest < max_tokens:
        raise ValueError(
            f"rollout.max_episode_tokens must be >= sampling.max_completion_length ({max_tokens}), got {longest}"
        )
    return EngineLimits(
        max_prompt_tokens=config.data.max_prompt_length,
        max_tokens=max_tokens,
        num_slots=num_slots,
        num_parked=arguments.parked,
        max_row_tokens=longest,
        max_waiting=arguments.queue,
        chunk=arguments.chunk,
    )


def _say(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
