"""Environments and tools in worker processes: what they may do without harming a step. Every test runs real workers."""

import os
import textwrap

import pytest

from rewards.environment_runner import EnvironmentRunner

QUESTION = [{"role": "user", "content": "Which number?"}]

GUESS = '''
    import random
    from rewards.environment import Step

    class Guess:
        """A number from 1 to 100, which the row may hold; hints until it is found."""

        def reset(self, row, seed):
            self.number, self.turns = row.get("number") or random.randint(1, 100), 0
            return row["prompt"]

        def step(self, message):
            self.turns += 1
            guess = int(message["content"])
            if guess == self.number:
                return Step(reward=1.0 / self.turns, done=True, metrics={"turns": self.turns})
            hint = "higher" if guess < self.number else "lower"
            return Step([{"role": "user", "content": hint}], metrics={"distance": abs(guess - self.number)})

        def close(self):
            print("closed", self.number)
'''

TOOLS = '''
    import asyncio

    def add(a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b

    async def double(a: int) -> int:
        """Doubles a number.

        Args:
            a: the number
        """
        await asyncio.sleep(0)
        return 2 * a

    def divide(a: int, b: int) -> float:
        """Divides a number.

        Args:
            a: the number
            b: by what
        """
        return a / b
'''


@pytest.fixture
def write(tmp_path):
    """Write a file; the result is the reference of one of its names."""

    def write_file(code: str, name: str = "mine"):
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(code))
        return lambda attribute: f"{path}:{attribute}"

    return write_file


def start(environments=None, tools=(), **options):
    limits = {"num_workers": 1, "step_timeout_seconds": 5.0, "episode_timeout_seconds": 20.0}
    limits |= {"max_episodes_per_worker": 16}
    if isinstance(environments, str):
        environments = {"game": environments}
    return EnvironmentRunner(environments or {}, list(tools), **(limits | options))


def replies_of(runner, count, seconds=30.0):
    """So many replies, by episode."""
    found = []
    while len(found) < count:
        new = runner.poll(seconds)
        assert new, found
        found += new
    assert len(found) == count
    return {reply.episode: reply for reply in found}


def ask(runner, episode, method, *arguments):
    getattr(runner, method)(episode, *arguments)
    return replies_of(runner, 1)[episode]


def hermes(name, **arguments):
    import json

    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


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


def test_an_episode_that_fails_costs_only_itself(write):
    guess = write(GUESS)
    with start(guess("Guess")) as runner:
        for episode in (1, 2):
            runner.begin(episode, {"prompt": "a text prompt", "number": 3}, 0)
        assert {reply.messages for reply in replies_of(runner, 2).values()} == {"a text prompt"}
        runner.step(1, "three")
        runner.step(2, "3")
        replies = replies_of(runner, 2)
        assert replies[1].failure is not None
        kind, message = replies[1].failure
        assert kind == "exception"
        assert message.startswith("ValueError: invalid literal for int()")
        assert "(mine.py:" in message
        assert replies[2].reward == 1.0
        assert ask(runner, 1, "finish", "failure").failure == replies[1].failure
        assert ask(runner, 2, "finish", "done").failure is None


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


def test_tools_answer_calls_in_their_order_and_tell_the_policy_what_is_wrong(write):
    tools = write(TOOLS)
    with start(tools=[tools("add"), tools("double"), tools("divide")], tool_format="hermes") as runner:
        assert [schema["function"]["name"] for schema in runner.tools] == ["add", "double", "divide"]
        assert runner.forms == {"tools": "tools"}
        assert ask(runner, 0, "begin", {"prompt": QUESTION}, 5).messages == QUESTION
        calls = [hermes("double", a=4), hermes("add", a=1, b=2), hermes("divide", a=1, b=0), hermes("multiply", a=1)]
        reply = ask(runner, 0, "step", "Let me see.\n" + "\n".join(calls) + "<tool_call>{</tool_call>")
        assert [message["content"] for message in reply.messages[:3]] == ["8", "3", "{'error': 'division by zero'}"]
        assert "there is no tool 'multiply'; tools are add, double, divide" in reply.messages[3]["content"]
        assert reply.messages[4]["name"] == "unknown"
        assert "the call is no JSON object" in reply.messages[4]["content"]
        assert (reply.num_tool_calls, reply.num_bad_tool_calls, reply.done) == (5, 3, False)
        assert reply.action["content"].startswith("Let me see.")
        assert [call["function"]["name"] for call in reply.action["tool_calls"]] == [
            "double",
            "add",
            "divide",
            "multiply",
        ]
        ids = [call["id"] for call in reply.action["tool_calls"]]
        assert [message["tool_call_id"] for message in reply.messages[:4]] == ids
        assert len({*ids}) == 4
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
