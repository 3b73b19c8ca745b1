"""An agent with a loop of its own, written for OpenAI's client: it knows nothing of who answers, or of training."""

import json
from typing import Any

import openai

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]
MAX_TURNS = 3


async def run(base_url: str, row: dict[str, Any], api_key: str) -> float:
    """Has the model answer a sum, for which it may call a tool; returns 1 if the answer is right."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages: list[Any] = [*row["prompt"]]
    for _ in range(MAX_TURNS):
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return float((message.content or "").strip() == row["answer"])
        for call in message.tool_calls:
            result = add(call.function.arguments) if call.type == "function" else "error: no such tool"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return 0.0


def add(arguments: str) -> str:
    """What the tool answers to arguments in JSON, right or not."""
    try:
        values = json.loads(arguments)
        return str(int(values["a"]) + int(values["b"]))
    except (TypeError, KeyError, ValueError) as error:
        return f"error: {error}"
