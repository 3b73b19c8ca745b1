"""Does transformers give the same greedy answers as Tandem?

    grpo export runs/smollm2_sums my_smollm2
    grpo eval runs/smollm2_sums --output answers.jsonl
    python examples/smollm2_sums/check_export.py my_smollm2 answers.jsonl     # needs torch

Loads the exported folder with transformers and decodes every held-out prompt greedily; prints how many answers are
equal and exits with 1 when one is not.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SYSTEM_PROMPT = "Answer with the number only. The answer can be negative, for example -3."
MAX_NEW_TOKENS = 16


def main(folder: str, answers: str) -> int:
    """Compares; returns the exit status."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [json.loads(line) for line in pathlib.Path(answers).read_text(encoding="utf-8").splitlines()]
    equal = 0
    for row in rows:
        messages = row["prompt"]
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        equal += answer == row["completion"]
        if answer != row["completion"]:
            print(f"{messages[-1]['content']!r}: transformers {answer!r}, Tandem {row['completion']!r}")
    print(f"{equal} of {len(rows)} greedy answers are equal")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
