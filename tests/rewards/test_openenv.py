"""Servers of OpenEnv as environments: one on the loopback, where openenv is installed, and what needs none."""

import contextlib
import http.server
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from rewards.openenv_environment import action_of, observation_text, opened, read_schema
from tests.helpers.environments import ask, replies_of, start

# Counts what it is told, and is over when it is told the number that the row has.
SERVER = """
import random
import sys
import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

class Guess(Action):
    number: {type}
    {more}

class Hint(Observation):
    hint: str = ""
    {seen}

class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, most=10):
        self.seen, self.number = 0, random.Random(seed).randint(1, most)
        return Hint(hint=f"1 to {{most}}", done=False)

    def step(self, action):
        self.seen += 1
        if self.seen == 4:
            raise RuntimeError("too often")
        guess = int(action.number)
        hint = "right" if guess == self.number else "higher" if guess < self.number else "lower"
        return Hint(hint=hint, reward=float(guess == self.number), done=guess == self.number{told})

    @property
    def state(self):
        return State()

uvicorn.run(create_fastapi_app(Game, Guess, Hint, max_concurrent_envs=8), port=int(sys.argv[1]), log_level="warning")
"""
QUESTION = [{"role": "user", "content": "Guess."}]


@contextlib.contextmanager
def serving(folder: pathlib.Path, **parts: str) -> Iterator[str]:
    """The URL of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = folder / f"server{port}.py"
    path.write_text(SERVER.format(**{"type": "str", "more": "", "seen": "", "told": "", **parts}))
    with subprocess.Popen([sys.executable, str(path), str(port)]) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def test_a_server_is_played_by_its_url_and_episodes_have_sessions_of_their_own(tmp_path):
    pytest.importorskip("openenv", reason="openenv is not installed: pip install 'tandem-grpo[openenv]'")
    with serving(tmp_path) as url, start({"openenv": f"openenv:{url}"}) as runner:
        assert runner.forms == {"openenv": "openenv"}
        for episode in range(3):
            runner.begin(episode, {"prompt": QUESTION, "most": 2, "unknown": 7}, 5 if episode < 2 else 6)
        opened = [reply.messages for reply in replies_of(runner, 3).values()]
        assert opened == [[{"role": "user", "content": "Guess.\n\n1 to 2"}]] * 3
        for episode in range(3):
            runner.step(episode, "1")
        first = replies_of(runner, 3)
        for episode in range(3):
            runner.step(episode, "2")
        second = replies_of(runner, 3)
        hints = [(first[e].messages[0]["content"], second[e].messages[0]["content"]) for e in range(3)]
        assert hints[0] == hints[1], "the same seed"
        for one, other in hints:
            assert (one, other) in (("right", "lower"), ("higher", "right")) or one == "right"
        for replies in (first, second):
            for reply in replies.values():
                right = reply.messages[0]["content"] == "right"
                assert (reply.reward, reply.done) == (float(right), right)
        ask(runner, 0, "step", "9")
        failure = ask(runner, 0, "step", "9").failure  # the fourth turn
        assert failure is not None
        assert "Server error: too often (code: EXECUTION_ERROR)" in failure[1]
        assert ask(runner, 1, "finish", "done").failure is None


def test_actions_of_several_fields_are_json_and_what_is_none_is_answered(tmp_path):
    pytest.importorskip("openenv", reason="openenv is not installed: pip install 'tandem-grpo[openenv]'")
    parts = {"type": "int", "more": "why: str", "seen": "seen: int = 0", "told": ", seen=self.seen"}
    with serving(tmp_path, **parts) as url, start({"openenv": f"openenv:{url}"}) as runner:
        assert ask(runner, 0, "begin", {"prompt": "Guess.", "most": 1}, 5).messages == (
            'Guess.\n\n{"hint": "1 to 1", "seen": 0}'
        )
        wrong = {"no": "the turn must be a JSON object with number, why", '{"number": "x", "why": "y"}': "the schema"}
        for text, why in wrong.items():
            reply = ask(runner, 0, "step", text)
            assert (reply.failure, reply.done, reply.metrics) == (None, False, {"bad_actions": 1.0})
            assert reply.messages[0]["content"].startswith("error: ")
            assert why in reply.messages[0]["content"]
        reply = ask(runner, 0, "step", '```json\n{"number": 1, "why": "why not"}\n```')
        assert (reply.messages[0]["content"], reply.done) == ('{"hint": "right", "seen": 1}', True)


@pytest.mark.parametrize(
    ("schema", "text", "action"),
    [
        ({"required": ["m"], "properties": {"m": {"type": "string"}, "metadata": {}}}, '{"a": 1}', {"m": '{"a": 1}'}),
        ({"required": ["n"], "properties": {"n": {"type": "integer"}}}, " 4 ", {"n": 4}),
        ({"required": ["n"], "properties": {"n": {"type": "integer"}}}, "four", None),
        ({"properties": {"n": {"type": "integer"}}}, '{"n": 4}', {"n": 4}),
        ({"properties": {"n": {"type": "integer"}}}, "[4]", None),
        ({"required": ["a", "b"], "properties": {}}, '{"a": NaN, "b": 1}', None),
        ({"required": ["a", "b"], "properties": {}}, "[" * 100_000, None),
    ],
)
def test_a_turn_is_the_one_field_of_an_action_or_its_json(schema, text, action):
    if action is None:
        with pytest.raises(ValueError, match=r"^the turn must be "):
            action_of(text, schema)
    else:
        assert action_of(text, schema) == action


def test_observations_are_text_where_they_have_one_field_of_text():
    assert observation_text({"text": "hi", "metadata": {}, "other": None}) == "hi"
    assert observation_text({"metadata": {}}) == ""
    assert observation_text({"text": "hi", "seen": 1}) == '{"text": "hi", "seen": 1}'
    assert opened({}, "hi") == [{"role": "user", "content": "hi"}]
    assert opened({"prompt": "ask"}, "") == "ask"


def test_what_is_no_server_of_openenv_is_refused_and_no_other_place_is_asked():
    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/schema")
            self.end_headers()

        def log_message(self, *arguments) -> None:
            pass

    for url in ("127.0.0.1:8000", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="is named as openenv:http://HOST:PORT"):
            read_schema(url, "rollout.environment")
    with pytest.raises(ValueError, match=re.escape("the server http://127.0.0.1:9 does not answer")):
        read_schema("http://127.0.0.1:9", "rollout.environment")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match=r"does not answer \(Found\)"):
            read_schema(f"http://127.0.0.1:{server.server_port}", "rollout.environment")
        server.shutdown()
