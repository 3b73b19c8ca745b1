"""The tool, and the conversations that the warm start imitates."""

import hashlib

SHARE_OF_CALLS = 0.2  # of questions that the warm start answers with the tool


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def conversations(row: dict) -> list[dict]:
    """Turns for one sum: mostly an answer at once, now and then a call of the tool, and the answer after its result."""
    question, answer = row["prompt"], row["answer"]
    asked = {"role": "user", "content": question}
    share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") / 2**32
    if share >= SHARE_OF_CALLS:
        return [{"prompt": [asked], "answer": answer}]
    a, b = question.removesuffix("=").split("+")
    call = f"[add(a={a}, b={b})]"
    result = {"role": "tool", "content": answer, "name": "add", "tool_call_id": "1"}
    return [
        {"prompt": [asked], "answer": call},
        {"prompt": [asked, {"role": "assistant", "content": call}, result], "answer": answer},
    ]
