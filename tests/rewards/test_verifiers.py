"""Tasks of verifiers 0.4, unchanged, as reward functions. The package is no dependency, and nothing runs without it."""

import pytest

from rewards.contract import RewardSpec, bind
from rewards.runner import RewardRunner

vf = pytest.importorskip("verifiers.v1")

TASKS = """
import verifiers.v1 as vf

class Sum(vf.TaskData):
    answer: str
    level: int = 1

class Adding(vf.Task[Sum]):
    @vf.reward(weight=2.0, priority=1)
    async def right(self, task: Sum, trace: vf.Trace) -> float:
        (said,) = trace.assistant_messages
        if said.content == "break": raise KeyError("broken")
        return float(said.content.strip() == task.answer)

    @vf.reward(weight=0.5)
    async def form(self, trace: vf.Trace) -> dict[str, float]:
        branch, = trace.branches
        asked = [message.role for message in branch.messages[:-1]]
        return {"short": float(trace.num_output_tokens < 3), "asked": float(asked[-1] == "user") * len(asked)}

    @vf.reward
    async def in_a_box(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        raise AssertionError("there is no box")

    @vf.metric
    async def cut(self, trace: vf.Trace) -> float:
        return float(trace.is_truncated)

    @vf.metric
    async def level(self, task: Sum, trace: vf.Trace, runtime: vf.Runtime | None = None) -> dict[str, float]:
        return {"level": task.level, "sampled": sum(trace.branches[0].sampled_mask)}

class Boxed(vf.Task[Sum]):
    @vf.reward
    async def in_a_box(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 1.0
"""


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_task_of_verifiers_judges_the_row_and_the_completion(tmp_path, is_chat):
    (tmp_path / "my_tasks.py").write_text(TASKS)
    texts, rows = ["4", " 5", "break", "4 4"], ["4", "4", "4", "4"]
    prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}] if is_chat else "2+2="
    completions = [[{"role": "assistant", "content": text}] if is_chat else text for text in texts]
    columns = {"answer": rows, "level": [1, 2, 3, 4], "other": [None] * 4}
    spec = RewardSpec("adding", f"{tmp_path}/my_tasks.py:Adding", 1.0, {})
    with RewardRunner([spec], list(columns), 2, 30.0) as runner:
        assert runner.elementwise == ["adding"]
        ids = [[7], [7, 8], [7], [7, 8, 9]]
        reasons = ["eos", "length", "eos", "stop"]
        result = runner.score([prompt] * 4, completions, columns, ids, finish_reasons=reasons)
    asked = 2 if is_chat else 1
    assert [row[0] for row in result.rewards] == [2.5 + asked / 2, 0.5 + asked / 2, None, asked / 2]
    assert result.logged[1]["adding"] == {
        "right": 0.0,
        "short": 1.0,
        "asked": asked,
        "cut": 1.0,
        "level": 2.0,
        "sampled": 2.0,
        "score": 0.5 + asked / 2,
    }
    assert result.sums["adding"]["right"] == [1.0, 3]
    (problem,) = result.problems
    assert "task Adding scoring: KeyError: 'broken'" in problem


def test_a_task_that_cannot_judge_here_is_refused_with_the_way_out(tmp_path):
    namespace: dict = {"__name__": "my_tasks"}
    exec(TASKS, namespace)
    with pytest.raises(ValueError, match=r"'Adding': the data of Adding requires 'answer', .* \(there are gold\)"):
        bind(namespace["Adding"], ["gold"], {})
    with pytest.raises(ValueError, match=r"a @vf\.reward method that does without `runtime`.* got in_a_box"):
        bind(namespace["Boxed"], ["answer"], {})
    method = namespace["Adding"](namespace["Sum"](answer="4")).right
    with pytest.raises(ValueError, match=r"'trace', as @vf\.reward methods of .* as in my_tasks\.py:MyTask"):
        bind(method, ["answer"], {})
