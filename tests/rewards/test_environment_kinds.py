"""Environments in the forms of TRL 1.16 and SkyRL-Gym 0.4, and what is refused at the start."""

import pytest

from tests.helpers.environments import GUESS, QUESTION, TOOLS, ask, hermes, replies_of, start, writer


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


# As `GRPOTrainer` of TRL 1.16 takes it for `environment_factory`.
COUNTER = '''
    import os

    class Counter:
        """Counts up to a target."""

        made = 0

        def __init__(self):
            Counter.made += 1
            self.number = Counter.made

        def reset(self, **kwargs):
            self.asked, self.value = kwargs, 0
            text = f" Count to {kwargs['target']}."
            return kwargs["says"] if "says" in kwargs else text

        def increment(self, by: int) -> str:
            """Adds to the counter.

            Args:
                by: how much

            Returns:
                The value.
            """
            self.value += by
            return f"{self.number}: {self.value}"

        async def look(self) -> int:
            """Shows the counter."""
            return self.value

        def close(self):
            os._exit(9)  # no tool, and TRL does not call it

        def _hidden(self):
            pass

        async def get_reward(self):
            return None if self.asked["target"] < 0 else float(self.value == self.asked["target"])

    def make():
        return Counter()
'''


def test_a_class_for_trl_is_reset_with_the_row_and_its_methods_are_tools(write):
    counter, tools = write(COUNTER), write(TOOLS, "tools")
    with start(counter("Counter"), tools=[tools("add")], tool_format="hermes") as runner:
        assert runner.forms == {"game": "trl"}
        # By name, as inspect.getmembers lists them; TRL, too, shows the tools of the run first.
        assert [schema["function"]["name"] for schema in runner.tools] == ["add", "increment", "look"]
        assert "by" in runner.tools[1]["function"]["parameters"]["properties"]
        row = {"prompt": [{"role": "system", "content": "s"}, *QUESTION], "target": 5}
        begun = ask(runner, 0, "begin", row, 0)
        assert begun.messages == [*row["prompt"][:1], {"role": "user", "content": "Which number? Count to 5."}]
        text = hermes("increment", by=2) + hermes("look") + hermes("increment", by=3) + hermes("add", a=1, b=1)
        reply = ask(runner, 0, "step", text)
        # Plain functions run in order, the async one meanwhile; its answer stands in its place.
        assert [message["content"] for message in reply.messages] == ["1: 2", "5", "1: 5", "2"]
        assert [message["name"] for message in reply.messages] == ["increment", "look", "increment", "add"]
        assert not reply.done
        assert ask(runner, 0, "step", "I am there.").done
        assert ask(runner, 0, "finish", "done").reward == 1.0
        # Rows without a prompt, and a prompt in parts. The instance of the first episode is reset again.
        assert ask(runner, 1, "begin", {"target": 1}, 0).messages == [{"role": "user", "content": " Count to 1."}]
        assert ask(runner, 1, "step", hermes("increment", by=1)).messages[0]["content"] == "1: 1"
        parts = [{"role": "user", "content": [{"type": "text", "text": "Now:"}]}]
        begun = ask(runner, 2, "begin", {"target": -1, "prompt": parts}, 0)
        assert begun.messages[0]["content"] == [*parts[0]["content"], {"type": "text", "text": " Count to -1."}]
        assert ask(runner, 2, "step", hermes("increment", by=1)).messages[0]["content"] == "2: 1"
        assert ask(runner, 2, "finish", "turns").reward is None  # it declined to judge
        assert ask(runner, 1, "finish", "turns").reward == 1.0
        quiet = {"prompt": QUESTION, "target": 1, "says": None}
        assert ask(runner, 3, "begin", quiet, 0).messages == QUESTION
        assert ask(runner, 3, "step", hermes("increment", by=1)).messages[0]["content"][:2] in ("1:", "2:")
        said = {**quiet, "says": [{"type": "text", "text": " Begin."}]}
        assert ask(runner, 4, "begin", said, 0).messages[0]["content"] == "Which number? Begin."
        assert ask(runner, 5, "begin", {**quiet, "says": [{"type": "image"}]}, 0).failure[0] == "not_a_step"


# As the classes of SkyRL-Gym 0.4 that derive from BaseTextEnv.
SKYRL = """
    class BaseTextEnv:
        def __init__(self):
            self.turns, self.max_turns = 0, 1

        def init(self, prompt):
            return prompt, {}

        def get_metrics(self):
            return {}

        def close(self):
            print("closed")

    class Env(BaseTextEnv):
        def __init__(self, env_config=None, extras={}):
            super().__init__()
            self.truth, self.max_turns = extras["reward_spec"]["ground_truth"], extras["max_turns"]

        def step(self, action):
            self.turns += 1
            done = self.turns >= self.max_turns or action == self.truth
            result = dict(observations=[], reward=float(action == self.truth), done=done, metadata={"a": self.turns})
            if not done:
                result["observations"] = [{"role": "user", "content": "no"}]
            result["postprocessed_action"] = action[:3] if "rewrite" in action else None
            return result

        def get_metrics(self):
            return {"turns": self.turns, "truth": self.truth}
"""


def test_a_class_of_skyrl_gym_is_played(write, tmp_path):
    env = write(SKYRL)
    row = {"prompt": QUESTION, "reward_spec": {"ground_truth": "4"}, "max_turns": 3}
    with start(env("Env"), log_path=tmp_path / "log") as runner:
        assert runner.forms == {"game": "skyrl"}
        assert ask(runner, 0, "begin", row, 0).messages == QUESTION
        wrong = ask(runner, 0, "step", "5")
        assert (wrong.messages, wrong.reward, wrong.done) == ([{"role": "user", "content": "no"}], 0.0, False)
        right = ask(runner, 0, "step", "4")
        assert (right.messages, right.reward, right.done) == ([], 1.0, True)
        ended = ask(runner, 0, "finish", "done")
        assert (ended.reward, ended.metrics) == (None, {"turns": 2.0})
        ask(runner, 1, "begin", row, 0)
        kind, message = ask(runner, 1, "step", "rewrite").failure
        assert (kind, "postprocessed_action" in message) == ("not_a_step", True)
        assert "plays chats" in ask(runner, 2, "begin", {**row, "prompt": "a text"}, 0).failure[1]
    assert (tmp_path / "log").read_text().count("closed") == 2


def test_the_row_chooses_one_of_several_environments(write):
    guess, counter = write(GUESS), write(COUNTER, "counter")
    environments = {"guess": guess("Guess"), "count": counter("make")}
    with start(environments, tool_format="hermes") as runner:
        assert runner.forms == {"guess": "own", "count": "trl"}
        assert [len(runner.tools_of[name]) for name in environments] == [0, 2]
        assert len(runner.tools) == 2
        runner.begin(0, {"prompt": "p", "environment": "guess", "number": 4}, 0)
        runner.begin(1, {"prompt": "p", "environment": "count", "target": 4}, 0)
        replies = replies_of(runner, 2)
        assert (replies[0].messages, replies[1].messages) == ("p", "p Count to 4.")
        assert ask(runner, 0, "step", "4").reward == 1.0
        with pytest.raises(ValueError, match=r"must name one of rollout.environment \(guess, count\), got 'other'"):
            runner.begin(2, {"prompt": "p", "environment": "other"}, 0)


def test_an_environment_may_answer_calls_of_its_own_tools(write):
    game = write("""
        from rewards.environment import Step

        class Game:
            tools = [{"type": "function", "function": {"name": "move", "parameters": {"type": "object"}}}]

            def reset(self, row, seed):
                return row["prompt"]

            def step(self, message):
                calls = message.get("tool_calls", [])
                answers = [{"role": "tool", "content": str(call["function"])} for call in calls]
                return Step(answers, done=not calls)

            def close(self, reason):
                print("closed for", reason)
    """)
    with start(game("Game"), tool_format="hermes") as runner:
        assert [schema["function"]["name"] for schema in runner.tools] == ["move"]
        ask(runner, 0, "begin", {"prompt": QUESTION}, 0)
        reply = ask(runner, 0, "step", hermes("move", to=1) + "<tool_call>x</tool_call>")
        assert (reply.num_tool_calls, reply.num_bad_tool_calls, len(reply.messages)) == (2, 1, 2)
        assert "the call is no JSON object" in reply.messages[0]["content"]
        assert reply.messages[1]["content"] == "{'name': 'move', 'arguments': {'to': 1}}"
        only_bad = ask(runner, 0, "step", "<tool_call>x</tool_call>")  # which the environment does not see
        assert (only_bad.done, len(only_bad.messages)) == (False, 1)
        assert ask(runner, 0, "step", "enough").done


WRONG = '''
    def untyped(a):
        """Has no type.

        Args:
            a: a number
        """

    class Nothing:
        pass

    class WithTools:
        tools = [{"type": "function", "function": {"name": "move"}}]

        def reset(self, row, seed):
            pass

        def step(self, message):
            pass

        def close(self):
            pass

    class Endless:
        def reset(self, row, seed):
            pass

        def step(self, message):
            pass

    class Sized(WithTools):
        def __init__(self, size):
            pass

    class Fails:
        def __init__(self):
            raise RuntimeError("no display")

        def reset(self, **kwargs):
            pass
'''


@pytest.mark.parametrize(
    ("environment", "tools", "options", "message"),
    [
        (None, [], {}, "needs rollout.environment or rollout.tools, got neither"),
        (
            "Nothing",
            [],
            {},
            r"rollout.environment 'game': .*an environment must have reset\(row, seed\), step\(message\)",
        ),
        ("Fails", [], {}, "cannot be made without arguments: RuntimeError: no display"),
        ("Endless", [], {}, r"must have close\(\) beside reset\(row, seed\) and step\(message\), got none; add `def"),
        ("Sized", [], {}, "cannot be made without arguments: missing a required argument: 'size'; give them default"),
        ("Missing", [], {}, "has no attribute 'Missing'"),
        (None, ["untyped"], {}, "the tool 'untyped' has no schema: .*give each argument a type hint"),
        ("WithTools", [], {}, "rollout.tool_format must be one of hermes, .* got 'auto'"),
        ("WithTools", ["untyped"], {}, "it answers calls of its own 'tools' itself, so rollout.tools must be empty"),
        (None, ["untyped", "untyped"], {}, "there is another tool named 'untyped'"),
        (None, ["untyped"], {"tool_format": "xml"}, "rollout.tool_format must be auto or one of hermes"),
        ("Nothing", [], {"max_episodes_per_worker": 0}, "rollout.episodes_per_worker must be >= 1, got 0"),
        ("Nothing", [], {"num_workers": 0}, "rollout.num_workers must be >= 1, got 0"),
        ("Nothing", [], {"step_timeout_seconds": 0}, "rollout.step_timeout_seconds must be > 0 and finite, got 0"),
        ("Nothing", [], {"env": ["NO_SUCH_KEY"]}, "rewards.env passes NO_SUCH_KEY"),
        ("Nothing", [], {"memory_gb": -1}, "rollout.memory_gb must be > 0"),
    ],
)
def test_what_cannot_be_played_is_refused_at_the_start(write, environment, tools, options, message):
    wrong = write(WRONG)
    environments = None if environment is None else wrong(environment)
    with pytest.raises(ValueError, match=message):
        start(environments, [wrong(tool) for tool in tools], **options)
