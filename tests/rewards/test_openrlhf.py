"""Reward functions of OpenRLHF 0.11, called by OpenRLHF's own executor and by ours. The package is no dependency.

It needs ray, vLLM and flash-attention to train, but torch, transformers and aiohttp alone for the module that calls the
functions, with an engine that says what it is told in place of vLLM's.
"""

import asyncio
import pathlib
import re
import types

import pytest

from rewards.contract import RewardSpec
from rewards.runner import RewardRunner
from tests.helpers.places import ROOT

agent = pytest.importorskip("openrlhf.utils.agent", reason="needs openrlhf, torch and aiohttp", exc_type=ImportError)

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/rewards.md").read_text(), re.MULTILINE | re.DOTALL)
(OF_THE_PAGE,) = [block for block in BLOCKS if "def reward_func(" in block]
FUNCTIONS = {
    "of_the_page": OF_THE_PAGE,
    "of_tensors": """
import torch

def reward_func(queries, prompts, labels):
    right = torch.tensor([float(q == f"{p} {l} <eos>") for q, p, l in zip(queries, prompts, labels)])
    return {"rewards": 2 * right, "scores": right, "extra_logs": {"tokens": torch.tensor([len(queries[0].split())])}}
""",
    "without_scores": """
def reward_func(queries, prompts, labels):
    assert type(queries) is type(prompts) is type(labels) is list and len(queries) == len(prompts) == len(labels) == 1
    if "3" in queries[0]: raise KeyError("broken")
    return {"rewards": [float(queries[0].startswith(prompts[0])) / 2], "extra_logs": None}
""",
}
LABELS, DRAWN = ["2", "4", "3", "4"], [["2", "<eos>"], ["2", "2", "2"], ["3", "<eos>"], ["4"]]
PROMPT = "<bos> 2 + 2 ="


class Engine:
    """What the executor asks of vLLM's: token ids in, one completion out."""

    def __init__(self, token_ids):
        self.token_ids = token_ids

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        drawn = types.SimpleNamespace(token_ids=self.token_ids, finish_reason="stop", logprobs=None)
        return types.SimpleNamespace(outputs=[drawn])


def words():
    """A tokenizer with special tokens, which `decode` keeps where it is told to."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "2", "3", "4", "+", "="])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **special)


def number(value):
    """The number in what OpenRLHF keeps: a list or a tensor of one, or the number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value[0] if isinstance(value, list) else value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gets_and_gives_what_it_does_in_openrlhf(tmp_path: pathlib.Path, name):
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS[name])
    executor, tokenizer = agent.SingleTurnAgentExecutor(str(file)), words()
    params = types.SimpleNamespace(max_tokens=4, logprobs=None)
    expected = [
        asyncio.run(
            executor.execute(PROMPT, label, params, 32, tokenizer, Engine(tokenizer.convert_tokens_to_ids(drawn)))
        )
        for label, drawn in zip(LABELS, DRAWN, strict=True)
    ]
    texts = [(PROMPT, tokenizer.decode(one["observation_tokens"])) for one in expected]
    completions = [" ".join(word for word in drawn if word != "<eos>") for drawn in DRAWN]
    with RewardRunner([RewardSpec("own", f"{file}:reward_func", 1.0, {})], ["answer"], 1, 60.0) as runner:
        assert runner.wants_texts
        with runner.begin(["2 + 2 ="] * 4, {"answer": LABELS}) as scoring:
            scoring.add(range(4), completions, texts=texts)
            result = scoring.result()
    rewards = [None if one["reward"] is None else number(one["reward"]) for one in expected]
    assert [row[0] for row in result.rewards] == rewards
    assert rewards[:2] == {"of_the_page": [1.0, 0.0], "of_tensors": [2.0, 0.0], "without_scores": [0.5, 0.5]}[name]
    for one, logged in zip(expected, result.logged, strict=True):
        told = {} if one["reward"] is None else {"score": one["scores"], **one["extra_logs"]}
        assert logged.get("own", {}) == {key: number(value) for key, value in told.items()}
