"""Reward models for tests: the golden decoders of tests/files/models, each with a head of one label.

Run with transformers and torch, it writes what transformers computes from them:

    python -m tests.helpers.reward_model_golden
"""

import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
import transformers

from tests.helpers.places import FILES

EXPECTED = FILES / "golden/reward_models.json"
ARCHITECTURES = {  # {folder in tests/files/models: the class in transformers}
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "llama3_scaled_rope": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}
PAD = 0
CHAT_TEMPLATE = (
    "{% for message in messages %}<eos>{{ message['role'] }} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<eos>assistant {% endif %}"
)
# Lengths differ; the second ends with padding, the third holds some inside, the fourth is nothing else.
SEQUENCES = [
    *([5, 17, 42, 99, 8, 64, 3], [7, 30, 12, PAD, PAD], [9, PAD, PAD, 21, 60], [PAD, PAD], [33]),
    [(7 * place) % 97 + 3 for place in range(41)],
]


def write_folder(name: str, folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """A reward model with the decoder of this name and a head of its own. `changes`: of config.json; None drops one."""
    source = FILES / "models" / name
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": [ARCHITECTURES[name]], "id2label": {"0": "LABEL_0"}, "pad_token_id": PAD} | changes
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    size = tensors["model.norm.weight"].shape[0]
    tensors["score.weight"] = np.random.default_rng(size).normal(size=(1, size)).astype(np.float32)
    folder.mkdir(parents=True)
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer of characters in ASCII, with a BOS in front of raw text. It fits the 101 tokens of the decoders."""
    special = ["<pad>", "<eos>", "<bos>"]
    words = {token: number for number, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    backend = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **named)
    backend.chat_template = CHAT_TEMPLATE
    backend.save_pretrained(folder)


def main() -> None:
    """Writes the scores of transformers, in float32, of all sequences in one padded batch."""
    import tempfile

    import torch

    batch = np.full((len(SEQUENCES), max(map(len, SEQUENCES))), PAD)
    for row, ids in enumerate(SEQUENCES):
        batch[row, : len(ids)] = ids
    scores = {}
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_folder(name, pathlib.Path(scratch) / name)
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, output_loading_info=True, attn_implementation="eager"
            )
            assert not any(report.values()), report
            assert type(model).__name__ == ARCHITECTURES[name]
            with torch.no_grad():
                scores[name] = model(torch.tensor(batch)).logits[:, 0].tolist()
    EXPECTED.write_text(json.dumps({"transformers": transformers.__version__, "scores": scores}, indent=2) + "\n")


if __name__ == "__main__":
    main()
