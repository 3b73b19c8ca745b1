"""`grpo serve`: the command from its flags to the last request, its page, and clients of others."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import threading
from typing import Any

import httpx
import pytest

from rl.cli import main
from tests.helpers.pages import blocks
from tests.helpers.serving import SMALL, beside, write_model

BLOCKS = [(block.language, block.text) for block in blocks("docs/serving.md")]
BODY = {"model": "policy", "prompt": "ab", "max_tokens": 16, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_the_command_serves_what_its_page_shows_and_ends_what_it_has_begun(folder, tmp_path, capsys):
    shell, python, _ = [text for _, text in BLOCKS]
    assert [language for language, _ in BLOCKS] == ["sh", "python", "python"]
    late: list[str] = []
    threads: list[threading.Thread] = []
    client = httpx.Client(timeout=600)
    begun = threading.Event()

    def ask(url: str) -> Any:
        body = json.loads(shell.partition("-d '")[2].rpartition("'")[0])
        told = client.post(f"{url}/v1/chat/completions", json=body).json()
        if shutil.which("curl"):
            command = ["bash", "-c", shell]
            by_curl = subprocess.run(command, env={**os.environ, "URL": url}, check=True, capture_output=True)
            assert json.loads(by_curl.stdout).keys() == told.keys()
        names: dict[str, Any] = {"URL": url, "print": lambda *values: None}
        exec(python, names)
        names["client"].close()
        score = {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1}
        assert client.post(f"{url}/v1/completions", json=score).json()["usage"]["completion_tokens"] == 0
        for _ in range(3):  # a client that goes away in the middle of its answer
            with client.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True}) as response:
                next(response.iter_bytes())

        def drain() -> None:
            body = {**BODY, "stream": True, "n": 8, "messages": [{"role": "user", "content": "ab"}]}
            del body["prompt"]
            with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                for line in response.iter_lines():
                    late.append(line)
                    begun.set()  # a role is told at once, and most of the eight answers wait for a slot

        threads.append(threading.Thread(target=drain))
        threads[0].start()
        begun.wait(600)  # and the signal comes
        return told

    status, told = beside(folder, ask, "--record", str(tmp_path / "calls.jsonl"))
    threads[0].join()
    client.close()
    assert status == 0
    assert told["usage"]["completion_tokens"] <= 8
    assert told["choices"][0]["message"]["role"] == "assistant"
    assert late[-2:] == ["data: [DONE]", ""]
    assert sum('"finish_reason":"length"' in line for line in late) == 8
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert calls[0]["messages"] == [{"role": "user", "content": "2+2?"}]
    (choice,) = calls[0]["choices"]
    assert len(choice["token_ids"]) == len(choice["logprobs"]) == told["usage"]["completion_tokens"]
    assert (len(choice["prompt_ids"]), choice["answer"]) == (
        told["usage"]["prompt_tokens"],
        told["choices"][0]["message"],
    )
    assert len(calls[-1]["choices"]) == 8
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
