"""Environments and tools in worker processes: what they may do without harming a step. Every test runs real workers."""

import os
import pathlib
import signal
import time

import pytest

from tests.helpers.environments import GUESS, QUESTION, TOOLS, ask, hermes, replies_of, start, writer


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


# Our own protocol.


def test_an_episode_is_opened_played_and_finished(write, tmp_path):
    guess = write(GUESS)
    with start(guess("Guess"), log_path=tmp_path / "log") as runner:
        assert runner.forms == {"game": "own"}
        assert runner.tools == []
        begun = ask(runner, 7, "begin", {"prompt": QUESTION, "number": 40}, 1)
        assert (begun.op, begun.messages, begun.failure) == ("begin", QUESTION, None)
        higher = ask(runner, 7, "step", "30")
        assert higher.messages == [{"role": "user", "content": "higher"}]
        assert (higher.reward, higher.done, higher.metrics) == (None, False, {"distance": 10.0})
        assert higher.action == {"role": "assistant", "content": "30"}
        found = ask(runner, 7, "step", "40")
        assert (found.messages, found.reward, found.done, found.metrics) == ([], 0.5, True, {"turns": 2.0})
        ended = ask(runner, 7, "finish", "done")
        assert (ended.op, ended.reward, ended.failure) == ("finish", None, None)
    assert "closed 40" in (tmp_path / "log").read_text()


def test_an_episode_that_fails_costs_only_itself_and_its_traceback_is_told_once(write, tmp_path):
    guess = write(GUESS)
    with start(guess("Guess"), num_workers=2, log_path=tmp_path / "log") as runner:
        for episode in (1, 2, 3):
            runner.begin(episode, {"prompt": "a text prompt", "number": 3}, 0)
        assert {reply.messages for reply in replies_of(runner, 3).values()} == {"a text prompt"}
        for episode, text in ((1, "three"), (2, "3"), (3, "3")):
            runner.step(episode, text)
        replies = replies_of(runner, 3)
        assert replies[1].failure is not None
        kind, message = replies[1].failure
        assert kind == "exception"
        assert message.startswith("ValueError: invalid literal for int()")
        assert "(mine.py:" in message
        assert replies[2].reward == 1.0
        assert ask(runner, 1, "finish", "failure").failure == replies[1].failure
        assert ask(runner, 3, "finish", "done").failure is None
        assert ask(runner, 2, "step", "in the other worker").failure is not None
        assert ask(runner, 2, "finish", "failure").failure is not None
    assert (tmp_path / "log").read_text().count("Traceback") == 1


def test_an_episode_that_hangs_or_dies_is_ended_and_the_others_are_played_again(write):
    game = write("""
        import os, random, time
        from rewards.environment import Step

        class Game:
            def reset(self, row, seed):
                return row["prompt"]

            def step(self, message):
                if message["content"] == "hang":
                    time.sleep(100)
                if message["content"] == "die":
                    os._exit(3)
                return Step([{"role": "user", "content": f"{message['content']} {random.random()}"}])

            def close(self):
                pass
    """)
    with start(game("Game"), step_timeout_seconds=0.5) as runner:
        for episode in range(4):
            runner.begin(episode, {"prompt": "p"}, episode)
        replies_of(runner, 4)
        for episode in range(4):
            runner.step(episode, "a")
        first = replies_of(runner, 4)
        for episode, text in enumerate(("hang", "die", "b", "b")):
            runner.step(episode, text)
        second = replies_of(runner, 4)
        assert second[0].failure[0] == "timeout"
        assert "no answer within 0.5 s" in second[0].failure[1]
        assert second[1].failure == ("died", "the worker process died with exit code 3")
        assert second[2].failure is None
        assert second[3].failure is None
    # Another worker, nothing is killed: the same answers.
    with start(game("Game")) as runner:
        for episode in (2, 3):
            ask(runner, episode, "begin", {"prompt": "p"}, episode)
            assert ask(runner, episode, "step", "a").messages == first[episode].messages
            assert ask(runner, episode, "step", "b").messages == second[episode].messages


# Tools.

TOOL_NAMES = ["add", "double", "divide", "last"]


def test_tools_answer_calls_in_their_order_and_tell_the_policy_what_is_wrong(write):
    tools = write(TOOLS)
    with start(tools=[*map(tools, TOOL_NAMES)], tool_format="hermes") as runner:
        assert [schema["function"]["name"] for schema in runner.tools] == TOOL_NAMES
        assert runner.forms == {"tools": "tools"}
        assert ask(runner, 0, "begin", {"prompt": QUESTION}, 5).messages == QUESTION
        calls = [hermes("double", a=4), hermes("add", a=1, b=2), hermes("divide", a=1, b=0), hermes("multiply", a=1)]
        calls.append(hermes("last", items=[1, 2]))
        reply = ask(runner, 0, "step", "Let me see.\n" + "\n".join(calls) + "<tool_call>{</tool_call>")
        assert [message["content"] for message in reply.messages[:3]] == ["8", "3", "{'error': 'division by zero'}"]
        assert "there is no tool 'multiply'; tools are add, double, divide, last" in reply.messages[3]["content"]
        assert reply.messages[4]["content"] == "2"
        assert reply.action["tool_calls"][4]["function"]["arguments"] == {"items": [1, 2]}, "a tool got a copy"
        assert reply.messages[5]["name"] == "unknown"
        assert "the call is no JSON object" in reply.messages[5]["content"]
        assert (reply.num_tool_calls, reply.num_bad_tool_calls, reply.done) == (6, 3, False)
        assert reply.action["content"].startswith("Let me see.")
        assert [call["function"]["name"] for call in reply.action["tool_calls"]] == [
            "double",
            "add",
            "divide",
            "multiply",
            "last",
        ]
        ids = [call["id"] for call in reply.action["tool_calls"]]
        assert [message["tool_call_id"] for message in reply.messages[:5]] == ids
        assert len({*ids}) == 5
        last = ask(runner, 0, "step", "It is 8.")
        assert (last.done, last.messages, last.num_tool_calls) == (True, [], 0)
        assert last.action == {"role": "assistant", "content": "It is 8."}


def test_the_process_that_asks_holds_no_environment(write):
    game = write("""
        import os
        from rewards.environment import Step

        class Game:
            def reset(self, row, seed):
                return str(os.getpid())

            def step(self, message):
                return Step(done=True)

            def close(self):
                pass
    """)
    with start(game("Game"), num_workers=2) as runner:
        for episode in range(4):
            runner.begin(episode, {}, 0)
        processes = {reply.messages for reply in replies_of(runner, 4).values()}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


# What an environment may do wrong.

LIES = """
    import os
    import numpy as np
    from rewards.environment import Step

    ANSWERS = {
        "nothing": None,
        "dict": {"reward": 1.0},
        "NaN": Step(reward=float("nan")),
        "text": Step(reward="1.0"),
        "huge": Step(reward=1e9),
        "half done": Step(done=0.5),
        "no list": Step("a message"),
        "no message": Step(["a message"]),
        "no content": Step([{"role": "user"}]),
        "assistant": Step([{"role": "assistant", "content": "I am the policy"}]),
        "object": Step([{"role": "user", "content": "a", "more": object()}]),
        "deep": Step([{"role": "user", "content": "a", "more": [] }]),
        "metric": Step(metrics={"a": "b"}),
        "no prompt": Step(prompt=[]),
        "both": Step([{"role": "user", "content": "a"}], prompt="b"),
        "begins and goes on": Step(prompt="b", sequence=0),
        "sequence": Step(sequence=-1),
        "again": Step(prompt=[{"role": "user", "content": "half \\ud800"}]),
        "long": Step([{"role": "user", "content": "a" * (2 << 20)}]),
        "fine": Step(
            [{"role": "user", "content": "half \\ud800"}],
            np.float32(0.5),
            np.bool_(False),
            {"a": np.int64(1), "b": float("inf")},
        ),
    }
    part = ANSWERS["deep"].messages[0]["more"]
    for _ in range(100):
        part.append([])
        part = part[0]

    class Liar:
        def reset(self, row, seed):
            return row["opening"]

        def step(self, message):
            if message["content"] == "exit":
                raise SystemExit(4)
            return ANSWERS[message["content"]]

        def close(self):
            raise ValueError("in close")
"""


def test_an_answer_that_is_none_costs_its_episode_and_says_what_is_wrong(write, tmp_path):
    liar = write(LIES)
    wrong = {
        "nothing": ("not_a_step", "step returned NoneType None, must return a rewards.environment.Step"),
        "dict": ("not_a_step", "step returned dict"),
        "NaN": ("not_a_number", "returned nan, a reward must be finite"),
        "text": ("not_a_number", "a reward must be a number or None"),
        "huge": ("out_of_range", "gave the reward 1e+09, it must be within 1e+06 of 0"),
        "half done": ("not_a_step", "step gave done float 0.5, it must be True or False"),
        "no list": ("not_a_step", "step gave the messages str 'a message'"),
        "no message": ("not_a_step", "a message must be a dict with role and content"),
        "no content": ("not_a_step", "step gave the content NoneType None, it must be a text"),
        "assistant": ("not_a_step", "step gave the role 'assistant', it must be one of user, tool, system"),
        "object": ("not_a_step", "in a message, which must be plain JSON"),
        "deep": ("not_a_step", "in a message, which must be plain JSON"),
        "metric": ("not_a_step", "a metric must be a name and a number"),
        "no prompt": ("not_a_step", "step gave the prompt list [], a prompt must be a text or messages"),
        "both": ("not_a_step", "step gave messages and a prompt, and the policy reads the prompt only"),
        "begins and goes on": ("not_a_step", "step gave a prompt and a sequence, and a prompt begins another sequence"),
        "sequence": ("not_a_step", "step gave the sequence int -1, it must be a number from 0"),
        "long": ("not_a_step", "an answer must be at most 1048576 bytes of JSON"),
        "exit": ("exception", "SystemExit: 4"),
    }
    with start(liar("Liar"), max_episodes_per_worker=100, log_path=tmp_path / "log") as runner:
        for episode in range(len(wrong) + 2):
            runner.begin(episode, {"opening": "p"}, 0)
        for episode, opening in ((100, 5), (101, []), (102, [{"content": "a"}])):
            runner.begin(episode, {"opening": opening}, 0)
        begun = replies_of(runner, len(wrong) + 5)
        assert [begun[number].failure[0] for number in (100, 101, 102)] == ["not_a_step"] * 3
        for episode, text in enumerate([*wrong, "fine", "again"]):
            runner.step(episode, text)
        replies = replies_of(runner, len(wrong) + 2)
        for episode, (kind, message) in enumerate(wrong.values()):
            assert replies[episode].failure is not None, episode
            assert replies[episode].failure[0] == kind
            assert message in replies[episode].failure[1]
            assert "\n" not in replies[episode].failure[1]
        again = replies[len(wrong) + 1]
        assert (again.prompt, again.messages) == ([{"role": "user", "content": "half ?"}], [])
        fine = replies[len(wrong)]
        assert fine.prompt is None
        assert fine.messages == [{"role": "user", "content": "half ?"}]
        assert (fine.reward, fine.done, fine.metrics) == (0.5, False, {"a": 1.0})
        assert ask(runner, len(wrong), "finish", "turns").failure is None  # what close raises is in the log
    assert "ValueError: in close" in (tmp_path / "log").read_text()


def test_bytes_that_are_no_reply_cost_the_episode_that_was_asked(write):
    game = write("""
        import os
        from rewards.environment import Step

        class Game:
            def reset(self, row, seed):
                return "p"

            def step(self, message):
                for number in range(3, 64):
                    try:
                        if os.readlink(f"/proc/self/fd/{number}").startswith("pipe:"):
                            os.write(number, b"\\0" * 7 + b"\\x02" + b"{}")
                    except OSError:
                        pass
                return Step()

            def close(self):
                pass
    """)
    with start(game("Game")) as runner:
        ask(runner, 0, "begin", {}, 0)
        kind, message = ask(runner, 0, "step", "a").failure
        assert kind == "died"
        assert "sent what is no message" in message
        assert ask(runner, 1, "begin", {}, 0).messages == "p"


def test_an_environment_that_holds_too_much_memory_is_ended(write):
    game = write("""
        import time
        from rewards.environment import Step

        class Game:
            def reset(self, row, seed):
                return "p"

            def step(self, message):
                if message["content"] == "hold":
                    held = bytearray(300_000_000)
                    held[::4096] = b"x" * len(held[::4096])
                    time.sleep(20)
                return Step()

            def close(self):
                pass
    """)
    with start(game("Game"), memory_gb=0.25, step_timeout_seconds=20.0) as runner:
        for episode in (0, 1):
            ask(runner, episode, "begin", {}, 0)
        runner.step(0, "hold")
        runner.step(1, "a")
        replies = replies_of(runner, 2)
        assert replies[0].failure[0] == "memory"
        assert "rollout.memory_gb (0.25)" in replies[0].failure[1]
        assert replies[1].failure is None


def test_an_episode_that_answers_otherwise_when_it_is_played_again_is_over(write):
    game = write("""
        import os
        from rewards.environment import Step

        class Game:
            def reset(self, row, seed):
                self.is_odd = seed % 2
                return "p"

            def step(self, message):
                if message["content"] == "die":
                    os._exit(1)
                return Step([{"role": "user", "content": str(os.getpid()) if self.is_odd else "same"}])

            def close(self):
                pass
    """)
    with start(game("Game")) as runner:
        for episode in range(3):
            ask(runner, episode, "begin", {}, episode)
            ask(runner, episode, "step", "a")
        ask(runner, 2, "step", "die")
        assert ask(runner, 0, "step", "b").failure is None
        kind, message = ask(runner, 1, "step", "b").failure  # it is told when it is asked
        assert kind == "replay"
        assert "it answered something else when it was played again" in message


def test_calls_of_an_episode_have_a_limit_together_and_workers_a_limit_of_episodes(write):
    game = write("""
        import time
        from rewards.environment import Step

        class Game:
            def reset(self, row, seed):
                return str(seed)

            def step(self, message):
                time.sleep(float(message["content"]))
                return Step()

            def close(self):
                pass
    """)
    options = {"max_episodes_per_worker": 1, "episode_timeout_seconds": 0.3, "step_timeout_seconds": 5.0}
    with start(game("Game"), **options) as runner:
        for episode in range(3):
            runner.begin(episode, {}, episode)
        assert [*replies_of(runner, 1)] == [0]
        assert runner.poll(0.0) == []
        assert ask(runner, 0, "step", "0.2").failure is None
        kind, message = ask(runner, 0, "step", "1").failure
        assert kind == "timeout"
        assert "no answer within 0." in message
        assert [*replies_of(runner, 1)] == [1]  # in the place of the first
        runner.finish(1, "done")
        replies = replies_of(runner, 2)
        assert (replies[1].op, replies[2].op, replies[2].messages) == ("finish", "begin", "2")
        runner.step(2, "0")
        runner.drop_all()
        assert runner.poll(0.0) == []
        assert ask(runner, 2, "begin", {}, 9).messages == "9"


PID = """
    import os
    from rewards.environment import Step

    class Game:
        def reset(self, row, seed):
            with open(row["file"], "w") as file:
                file.write(str(os.getpid()))
            return "p"

        def step(self, message):
            return Step([{"role": "user", "content": message["content"]}])

        def close(self):
            pass
"""


def kill(pid: int) -> None:
    """Ends a worker, and waits until its supervisor knows of it."""
    os.kill(pid, signal.SIGKILL)
    while pathlib.Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    time.sleep(0.2)


def test_a_worker_that_dies_while_nothing_is_asked_is_replaced_until_that_is_in_vain(write, tmp_path):
    game, pid = write(PID), tmp_path / "pid"
    with start(game("Game")) as runner:
        ask(runner, 0, "begin", {"file": str(pid)}, 0)
        first = int(pid.read_text())
        runner.drop_all()  # it is idle, and so it stays
        ask(runner, 0, "begin", {"file": str(pid)}, 0)
        assert int(pid.read_text()) == first
        kill(first)
        assert ask(runner, 0, "step", "a").messages[0]["content"] == "a"
        assert int(pid.read_text()) != first
        # Now the file cannot be imported any more.
        (tmp_path / "mine.py").write_text("raise RuntimeError('changed')")
        kill(int(pid.read_text()))
        kind, message = ask(runner, 0, "step", "b").failure
        assert kind == "exception"
        assert "while importing: rollout.environment 'game': " in message
        assert "RuntimeError: changed" in message
        write(PID)
        assert ask(runner, 1, "begin", {"file": str(pid)}, 0).messages == "p"


# Async environments.

ASYNC = """
    import asyncio, os, random, time
    import numpy as np
    from rewards.environment import Step

    waiting = []

    class Game:
        async def reset(self, row, seed):
            return "p"

        async def step(self, message):
            what = message["content"]
            if what == "die":
                os._exit(1)
            if what == "hang":
                await asyncio.sleep(100)
            if what == "block":
                time.sleep(100)
            if what == "together":  # for ever, when called one after another
                waiting.append(asyncio.Event())
                if len(waiting) == 3:
                    for event in waiting:
                        event.set()
                await waiting[len(waiting) - 1].wait()
            drawn = []
            for _ in range(3):
                await asyncio.sleep(0.001 * random.random())
                drawn += [random.random(), float(np.random.rand())]

            async def draw():
                await asyncio.sleep(0)
                return random.random()

            drawn += [await draw() for _ in range(2)]
            drawn.append(await asyncio.create_task(draw()))
            return Step([{"role": "user", "content": str(drawn)}])

        async def close(self):
            pass
"""


def test_async_episodes_are_played_at_the_same_time_and_each_draws_what_it_would_alone(write):
    game = write(ASYNC)
    with start(game("Game")) as runner:
        for episode in range(3):
            runner.begin(episode, {}, 10 + episode)
        replies_of(runner, 3)
        for text in ("together", "a"):
            for episode in range(3):
                runner.step(episode, text)
            together = replies_of(runner, 3)
    assert len({str(reply.messages) for reply in together.values()}) == 3
    with start(game("Game")) as runner:
        for episode in range(3):
            ask(runner, episode, "begin", {}, 10 + episode)
            ask(runner, episode, "step", "b")
            assert ask(runner, episode, "step", "c").messages == together[episode].messages


def test_of_async_episodes_that_run_at_the_same_time_the_guilty_one_is_found(write):
    game = write(ASYNC)
    texts = ["a", "die", "hang", "block", "a"]
    with start(game("Game"), step_timeout_seconds=0.4) as runner:
        for episode in range(len(texts)):
            runner.begin(episode, {}, episode)
        replies_of(runner, len(texts))
        for episode, text in enumerate(texts):
            runner.step(episode, text)
        replies = replies_of(runner, len(texts))
    failures = [replies[episode].failure for episode in range(len(texts))]
    assert [failure and failure[0] for failure in failures] == [None, "died", "timeout", "timeout", None]


def test_a_plain_function_may_run_a_loop_of_its_own(write):
    game = write("""
        import asyncio
        from rewards.environment import Step

        class Game:
            def reset(self, row, seed):
                return asyncio.run(self.answer())

            async def answer(self):
                await asyncio.sleep(0)
                return "from a loop"

            async def step(self, message):
                return Step(done=True)

            def close(self):
                pass
    """)
    with start(game("Game")) as runner:
        assert ask(runner, 0, "begin", {}, 0).messages == "from a loop"
        assert ask(runner, 0, "step", "a").done
