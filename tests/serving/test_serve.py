"""`grpo serve`: the command from its flags to the last request, its page, and clients of others."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rl.cli import main
from rl.data.tokenizer import load_tokenizer
from rl.models.files.hf import save_folder
from rl.models.flavours import create_policy
from tests.helpers.places import ROOT
from tests.helpers.tiny_models import noisy_params, tiny_config

PAGE = (ROOT / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
BODY = {"model": "policy", "prompt": "ab", "max_tokens": 16, "ignore_eos": True, "seed": 1}
CLIENT = httpx.Client(timeout=60)
SMALL = ["sampling.slots=2", "data.max_prompt_length=64", "sampling.max_completion_length=16", "mesh.num_devices=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face folder with a tiny model and a tokenizer of bytes with a chat template."""
    path = tmp_path_factory.mktemp("model")
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
            for _ in range(3000):
                with contextlib.suppress(httpx.TransportError):
                    if CLIENT.get(f"{url}/health").status_code == 200:
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


def test_the_command_serves_what_its_page_shows_and_ends_what_it_has_begun(folder, capsys):
    shell, python, _ = [text for _, text in BLOCKS]
    assert [language for language, _ in BLOCKS] == ["sh", "python", "python"]
    late: list[str] = []
    threads: list[threading.Thread] = []
    begun = threading.Event()

    def ask(url: str) -> Any:
        told = subprocess.run(["bash", "-c", shell], env={**os.environ, "URL": url}, check=True, capture_output=True)
        names: dict[str, Any] = {"URL": url, "print": lambda *values: None}
        exec(python, names)
        names["client"].close()
        for _ in range(3):  # a client that goes away in the middle of its answer
            with CLIENT.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True}) as response:
                next(response.iter_bytes())

        def drain() -> None:
            body = {**BODY, "stream": True, "n": 8, "messages": [{"role": "user", "content": "ab"}]}
            del body["prompt"]
            with CLIENT.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                for line in response.iter_lines():
                    late.append(line)
                    begun.set()  # a role is told at once, and most of the eight answers wait for a slot

        threads.append(threading.Thread(target=drain))
        threads[0].start()
        begun.wait(60)  # and the signal comes
        return json.loads(told.stdout)

    status, told = beside(folder, ask)
    threads[0].join()
    CLIENT.close()
    assert status == 0
    assert told["usage"]["completion_tokens"] <= 8
    assert told["choices"][0]["message"]["role"] == "assistant"
    assert late[-2:] == ["data: [DONE]", ""]
    assert sum('"finish_reason":"length"' in line for line in late) == 8
    said = capsys.readouterr().err
    assert "serving 'policy' at http://127.0.0.1:" in said
    assert said.endswith("stopped\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs a MODEL"),
        (("{folder}", "--host", "0.0.0.0"), "needs? an API key|without an API key"),
        (("{folder}", "--port", "70000"), "--port must be from 0 to 65535"),
        (("{folder}", "--chunk", "0"), "--chunk must be from 1 to 256"),
        (("{folder}", "--timeout", "0"), "--timeout must be seconds"),
        (("{folder}", "--host", "203.0.113.7"), "without an API key"),
        (("{folder}", "rollout.max_episode_tokens=8"), "rollout.max_episode_tokens must be >="),
        (("{folder}", "rollout.tools=[a.py:b]"), "rollout.tools|grpo serve"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(folder, arguments, words, capsys, monkeypatch):
    monkeypatch.delenv("GRPO_API_KEY", raising=False)
    more = [text.format(folder=folder) for text in arguments]
    assert main(["serve", *(more or ["--port", "0"]), *(SMALL if more else [])]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_port_that_is_taken_is_refused_before_the_weights_are_read(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(folder), "--port", str(taken.getsockname()[1]), *SMALL]) == 2
    assert "--host and --port must be an address of this machine that is free" in capsys.readouterr().err
