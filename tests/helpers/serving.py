"""A tiny model in a folder, and `grpo serve` of it beside a test."""

import contextlib
import os
import pathlib
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from rl.cli import main
from rl.data.tokenizer import load_tokenizer
from rl.models.files.hf import save_folder
from rl.models.flavours import create_policy
from tests.helpers.tiny_models import noisy_params, tiny_config

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
SMALL = ["sampling.slots=2", "data.max_prompt_length=64", "sampling.max_completion_length=16", "mesh.num_devices=1"]


def write_model(path: pathlib.Path) -> pathlib.Path:
    """A Hugging Face folder with a tiny model and a tokenizer of bytes with a chat template."""
    (path / "chat.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer("byte", path / "chat.jinja")
    policy = create_policy(tiny_config("qwen3", vocab_size=tokenizer.vocab_size), pure_nnx=True)
    save_folder(path / "model", policy.config, noisy_params(policy.config))
    tokenizer.save_pretrained(path / "model")
    return path / "model"


def beside(folder: pathlib.Path, ask: Callable[[str], Any], *more: str) -> tuple[int, Any]:
    """Serves the folder, asks from another thread, and stops the server by a signal. The exit status, and the
    answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, answers = f"http://127.0.0.1:{port}", []

    def run() -> None:
        try:
            with httpx.Client(timeout=600) as client:
                for _ in range(12_000):
                    with contextlib.suppress(httpx.TransportError):
                        if client.get(f"{url}/health").status_code == 200:
                            break
                    time.sleep(0.05)
                answers.append(ask(url))
        except Exception as error:  # noqa: BLE001 (raised again below)
            answers.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=run)
    thread.start()
    status = main(["serve", str(folder), "--port", str(port), "--name", "policy", *more, *SMALL])
    thread.join()
    if isinstance(answers[0], Exception):
        raise answers[0]
    return status, answers[0]
