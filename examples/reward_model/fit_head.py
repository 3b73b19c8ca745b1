"""Makes a reward model of answers that have scores: a linear head on a language model that stays as it is.

    python examples/reward_model/fit_head.py MODEL SCORED.jsonl OUT [--ridge 1.0]

In: a Hugging Face folder or hub id, and JSON lines with `prompt` (text or messages), `completion` and `score`, whoever
gave the score: people, a judge, a rule. Out: a folder for `function: "model:OUT"`, the same weights with a head
`score.weight`. The head is ridge regression from the hidden state of the last token to the score, in standard
deviations; a fifth of the lines is held out, and the correlation there is printed. A head without a bias gives scores
up to a constant, which no group's advantages see.
Legend: N lines, T token positions, D model.
"""

import argparse
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.models.files.hf import load_params, resolve_source
from rl.models.files.hf_config import read_config
from rl.models.flavours import policy_from_config
from rl.models.inputs import plain_inputs

_LINES_PER_CALL = 16


def main() -> None:
    """Reads the lines, computes their hidden states, fits the head, and writes the folder."""
    parser = argparse.ArgumentParser(description="a reward model of answers that have scores")
    parser.add_argument("model", help="Hugging Face folder or hub id")
    parser.add_argument("scored", type=pathlib.Path, help="JSON lines with prompt, completion and score")
    parser.add_argument("out", type=pathlib.Path, help="folder to write")
    parser.add_argument(
        "--ridge", type=float, default=1.0, help="penalty, as a share of the mean squared length of a hidden state"
    )
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"error: {arguments.out} must not exist yet; name another folder")
    lines = [json.loads(line) for line in arguments.scored.read_text(encoding="utf-8").splitlines()]
    scores_N = np.array([line["score"] for line in lines], float)
    hidden_ND = hidden_states(arguments.model, lines)
    held_out_N = np.arange(len(lines)) % 5 == 4
    head_D = fit(hidden_ND[~held_out_N], scores_N[~held_out_N], arguments.ridge)
    for name, chosen_N in (("fitted", ~held_out_N), ("held-out", held_out_N)):
        correlation = np.corrcoef(hidden_ND[chosen_N] @ head_D, scores_N[chosen_N])[0, 1]
        print(f"correlation with the scores of {chosen_N.sum()} {name} lines: {correlation:.3f}")
    write(resolve_source(arguments.model), arguments.out, head_D)
    print(f"written: {arguments.out}; rewards.functions: [{{function: 'model:{arguments.out}', name: model}}]")


def hidden_states(model: str, lines: list[dict]) -> np.ndarray:
    """The hidden state [N, D] of each line's last token, in float32."""
    config, tokenizer = load_config(None, [f"model.source={model}"]), load_tokenizer(model)
    folder = resolve_source(model)
    model_config = read_config(folder)
    policy, params = policy_from_config(config, model_config), load_params(folder, model_config)
    hidden = jax.jit(lambda params, tokens_BT: policy.hidden(params, plain_inputs(tokens_BT)))
    ids = [to_ids(tokenizer, line["prompt"], line["completion"]) for line in lines]
    length = max(map(len, ids))
    found = []
    for first in range(0, len(ids), _LINES_PER_CALL):
        part = ids[first : first + _LINES_PER_CALL]
        tokens_BT = np.zeros((_LINES_PER_CALL, length), np.int32)
        for row, one in enumerate(part):
            tokens_BT[row, : len(one)] = one  # a token sees no later one, so what stands behind does not matter
        hidden_BTD = np.asarray(hidden(params, jnp.asarray(tokens_BT)), np.float32)
        found += [hidden_BTD[row, len(one) - 1] for row, one in enumerate(part)]
    return np.stack(found)


def to_ids(tokenizer, prompt, completion) -> list[int]:
    """What the toolkit's reward models read, see `rl.rollout.reward_model.RewardModel.token_ids`."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt + completion)
    return tokenizer.encode_answered([*prompt, {"role": "assistant", "content": completion}])


def fit(hidden_ND: np.ndarray, scores_N: np.ndarray, ridge: float) -> np.ndarray:
    """The head [D]: argmin |X h - y|^2 + ridge * mean |x|^2 * |h|^2 over centred X and standardised y. Its dual form is
    small where there are fewer lines than dimensions.
    """
    x_ND = (hidden_ND - hidden_ND.mean(0)).astype(float)
    y_N = (scores_N - scores_N.mean()) / scores_N.std()
    gram_NN = x_ND @ x_ND.T
    penalty = ridge * np.trace(gram_NN) / len(y_N)
    return (x_ND.T @ np.linalg.solve(gram_NN + penalty * np.eye(len(y_N)), y_N)).astype(np.float32)


def write(folder: pathlib.Path, out: pathlib.Path, head_D: np.ndarray) -> None:
    """The folder with the head beside its weights, and a config.json that names the class."""
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, out / path.name)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    causal = raw["architectures"][0]
    raw |= {"architectures": [causal.replace("ForCausalLM", "ForSequenceClassification")], "num_labels": 1}
    raw |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    (out / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    weights = {
        name: value for name, value in load_file(folder / "model.safetensors").items() if name != "lm_head.weight"
    }
    save_file(weights | {"score.weight": head_D[None]}, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
