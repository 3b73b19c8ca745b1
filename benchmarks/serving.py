"""What an endpoint costs: requests over HTTP beside `Sampler.stream` on the same requests, and what many of them leave.

    python benchmarks/serving.py [--shape c] [--requests 256] [--connections 64] [--streamed] [--repeats 3] [--tiny]
    python benchmarks/serving.py --soak 10000 --tiny

Prompts of 64 to 128 token ids, 32 to 96 drawn tokens, a seed each, no EOS. Clients are asyncio connections in a process
of their own, whose CPU is shown apart; each sends its next request when it has the answer. The bar is 0.9 times the
tokens per second of the sampler. `--soak` mixes in requests that are hostile or go away, and shows the resident memory
on the way.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

BAR = 0.9


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and prints; returns the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", default="c", help="of benchmarks/shapes.py (default: c)")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--parked", type=int, default=0, help="completions kept for prompts that go on (default: 0)")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="send N requests, hostile ones among them")
    parser.add_argument("--tiny", action="store_true", help="a model and lengths that only show that it works")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--client", nargs=3, metavar=("PORT", "CONNECTIONS", "SOAK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.client is not None:
        port, connections, is_soak = map(int, arguments.client)
        print(json.dumps(asyncio.run(send_all(port, connections, json.load(sys.stdin), bool(is_soak)))))
        return {}
    from command import set_environment

    set_environment()
    result = soak(arguments) if arguments.soak else compare(arguments)
    print(json.dumps(result, indent=2))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(result))
    return result


class Endpoint:
    """A server of random weights in a thread, and the sampler beside it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import numpy as np
        import shapes
        import uvicorn
        from weights import Weights

        from rl.data.tokenizer import load_tokenizer
        from rl.sampler.slot_sampler import Sampler
        from rl.sampler.token_draw import SamplingParams
        from rl.serving.app import create_app
        from rl.serving.engine import Engine, EngineLimits

        config = shapes.CPU_SHAPES[arguments.shape]
        config = shapes.tiny_shape(config) if arguments.tiny else config
        rng = np.random.default_rng(0)
        low, high = (4, 12) if arguments.tiny else (32, 96)
        shortest, longest = (8, 16) if arguments.tiny else (64, 128)
        lengths = rng.integers(shortest, longest + 1, arguments.requests)
        self.prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
        self.limits = rng.integers(low, high + 1, arguments.requests).tolist()
        self.weights, self.sampling = Weights(config), SamplingParams(max_completion_length=high)
        self.slots = arguments.slots

        def sampler() -> Sampler:
            weights = self.weights
            rules = weights.run_config.mesh.rules
            return Sampler(weights.policy, weights.mesh, weights.shardings, rules=rules, slots=arguments.slots)

        self.plain = sampler()
        self.plain.expect(self.prompts, len(self.prompts), 1)
        self.plain.warm_up(self.weights.params, len(self.prompts), 1, self.sampling)
        self.plain.engine.programs.wait()
        row = 2 * high if arguments.parked else high
        limits = EngineLimits(longest, high, arguments.slots, arguments.parked, row, 10_000, arguments.chunk)
        self.engine = Engine(sampler(), self.sampling, limits)
        self.engine.warm_up(self.weights.params)
        self.engine.start(self.weights.params, seed=0)
        app = create_app(self.engine, load_tokenizer("byte"), "policy")
        settings = uvicorn.Config(app, port=0, log_level="error", access_log=False, lifespan="off")
        self.server = uvicorn.Server(settings)
        self.server.install_signal_handlers = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stream(self) -> int:
        """Draws all requests by the sampler. The number of tokens."""
        import jax

        from rl.sampler.contract import Request

        requests = [Request(i, i, 0, limit, i) for i, limit in enumerate(self.limits)]
        done = self.plain.stream(self.weights.params, self.prompts, requests, self.sampling, jax.random.key(0))
        return sum(len(completion.token_ids) for _, completion in done)

    def ask(self, bodies: Sequence[Any], connections: int, is_soak: bool = False) -> dict[str, Any]:
        """What clients in another process tell."""
        command = [sys.executable, __file__, "--client", str(self.port), str(connections), str(int(is_soak))]
        told = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, check=True)
        return json.loads(told.stdout)

    def bodies(self, streamed: bool) -> list[dict[str, Any]]:
        return [
            {"prompt": prompt, "max_tokens": limit, "seed": i, "ignore_eos": True, "stream": streamed}
            for i, (prompt, limit) in enumerate(zip(self.prompts, self.limits, strict=True))
        ]

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()
        self.engine.drain(10)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the endpoint and of the sampler, in turns."""
    endpoint = Endpoint(arguments)
    bodies = endpoint.bodies(arguments.streamed)
    num_tokens = sum(endpoint.limits)
    endpoint.ask([{**body, "max_tokens": 2} for body in bodies[:2]], 2)
    seconds: dict[str, list[float]] = {"sampler": [], "endpoint": []}
    cpu: dict[str, list[float]] = {"sampler": [], "endpoint": [], "client": []}
    lost = 0
    for repeat in range(arguments.repeats):
        for name in ("sampler", "endpoint")[:: 1 if repeat % 2 else -1]:
            start, cpu_start = time.perf_counter(), time.process_time()
            if name == "sampler":
                assert endpoint.stream() == num_tokens
                seconds[name].append(time.perf_counter() - start)
            else:
                told = endpoint.ask(bodies, arguments.connections)
                assert told["num_tokens"] == num_tokens, told
                seconds[name].append(told["seconds"])  # without the start of the other process
                cpu["client"].append(told["cpu"])
                lost += told["num_lost"]
            cpu[name].append(time.process_time() - cpu_start)
    endpoint.close()
    import numpy as np

    median = {name: float(np.median(values)) for name, values in seconds.items()}
    work = {name: float(np.median(values)) for name, values in cpu.items()}
    more = work["endpoint"] - work["sampler"]
    return {
        "shape": arguments.shape,
        "requests": len(bodies),
        "tokens": num_tokens,
        "streamed": arguments.streamed,
        "seconds": median,
        "cpu_seconds": work,
        "ratio": median["sampler"] / median["endpoint"],
        "bar": BAR,
        "ratio_of_cpu": work["sampler"] / work["endpoint"],
        "more_cpu_ms_per_request": 1e3 * more / len(bodies),
        "more_cpu_us_per_token": 1e6 * more / num_tokens,
        "client_cpu_ms_per_request": 1e3 * work["client"] / len(bodies),
        "lost": lost,
    }


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Resident memory after each tenth of many requests, and what became of them."""
    endpoint = Endpoint(arguments)
    total = {"num_right": 0, "num_refused": 0, "num_left": 0, "num_lost": 0}
    resident, start = [], time.perf_counter()
    bodies: list[Any] = endpoint.bodies(arguments.streamed)
    for tenth in range(10):
        mixed: list[Any] = []
        for i in range(arguments.soak // 10):
            body = dict(bodies[i % len(bodies)], seed=tenth * arguments.soak + i)
            kinds = [body, body, body, body, {**body, "stream": True}, {**body, "n": 2}]
            kinds += [
                {**body, "echo": True, "logprobs": 0},
                {"leave": body},
                {"raw": HOSTILE[i % len(HOSTILE)].decode("latin-1")},
                {**body, "prompt": body["prompt"][: 1 + i % 7]},
            ]
            mixed.append(kinds[i % len(kinds)])
        told = endpoint.ask(mixed, arguments.connections, is_soak=True)
        for name in total:
            total[name] += told[name]
        resident.append(resident_megabytes())
    deadline = time.monotonic() + 30
    while endpoint.engine._num_open and time.monotonic() < deadline:
        time.sleep(0.05)
    counts = endpoint.engine.counts
    endpoint.engine.forget()
    time.sleep(2)
    session = endpoint.engine._session
    left = None if session is None else len(session._schedule._requests)
    endpoint.close()
    return {
        "requests": arguments.soak,
        **total,
        "seconds": time.perf_counter() - start,
        "resident_mb": resident,
        "cancelled": counts.num_cancelled,
        "still_open": endpoint.engine._num_open,
        "left_in_books": left,
    }


_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
HOSTILE = [
    b"GET / HTTP/1.1\r\n\r\n",
    _HEAD + b"3\r\n\r\n{{{",
    _HEAD + b"99999999999\r\n\r\n{",
    b"\x00\xff\x00\xff\r\n\r\n",
    _HEAD + b"20000\r\n\r\n" + b"[" * 20000,
]


def resident_megabytes() -> float:
    """Of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# The clients, in their own process


async def send_all(port: int, connections: int, bodies: list[Any], is_soak: bool) -> dict[str, Any]:
    """Sends bodies over so many connections, each its next one when it has the answer."""
    left = list(reversed(bodies))
    told = {"num_tokens": 0, "num_right": 0, "num_refused": 0, "num_left": 0, "num_lost": 0}

    async def connection() -> None:
        streams = await asyncio.open_connection("127.0.0.1", port)
        while left:
            body = left.pop()
            if is_soak and ("raw" in body or "leave" in body):
                await rude(port, body, told)
                continue
            try:
                status, answer = await send(*streams, body)
            except (OSError, EOFError, ValueError):
                told["num_lost"] += 1
                streams = await asyncio.open_connection("127.0.0.1", port)
                continue
            if status == 200:
                told["num_right"] += 1
                told["num_tokens"] += body["max_tokens"]
                is_whole = answer.endswith(b"data: [DONE]\n\n") if body.get("stream") else b'"finish_reason"' in answer
                told["num_lost"] += not is_whole
            else:
                told["num_refused"] += 1
        streams[1].close()

    start, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(connection() for _ in range(connections)))
    return {**told, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: Any) -> tuple[int, bytes]:
    """The status and the body of an answer."""
    writer.write(request_bytes(body))
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    lower = head.lower()
    if b"transfer-encoding: chunked" not in lower:
        length = int(lower.partition(b"content-length:")[2].partition(b"\r\n")[0])
        return status, await reader.readexactly(length)
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return status, b"".join(parts)


async def rude(port: int, body: Any, told: dict[str, int]) -> None:
    """A client that sends what is no request, or goes away before the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(OSError):
        if "raw" in body:
            writer.write(body["raw"].encode("latin-1"))
            told["num_refused"] += 1
        else:
            writer.write(request_bytes(body["leave"]))
            told["num_left"] += 1
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.02)
    writer.close()


def request_bytes(body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


if __name__ == "__main__":
    main()
