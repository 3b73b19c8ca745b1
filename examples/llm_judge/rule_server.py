"""A judge that is no language model: a rule behind the recipe's URL, to try the recipe where no model can be served.

    python examples/llm_judge/rule_server.py [PORT]      # 8000, what the recipe asks

It counts what can be counted of the rubric, and knows nothing of truth: a policy that pleases it explains nothing.
"""

import http.server
import json
import re
import sys

_COMPLETION = re.compile(r"\[completion (\w+)\]\n(.*)\n\[end of completion \1\]", re.DOTALL)


def score(text: str) -> int:
    """1 to 5: a point each for one sentence, a cause, 8 to 30 words, and no word of more than 8 letters."""
    words = re.findall(r"[a-z]+", text.lower())
    is_one_sentence = re.fullmatch(r"[^.!?]+[.!?]", text.strip()) is not None
    has_cause = not {"because", "since", "so"}.isdisjoint(words)
    return 1 + is_one_sentence + has_cause + (8 <= len(words) <= 30) + (0 < max(map(len, words), default=0) <= 8)


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers chat completions as an OpenAI-compatible server does."""

    protocol_version = "HTTP/1.1"  # which keeps the client's connections

    def do_POST(self) -> None:
        """The score of the completion in the last message."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = request["messages"][-1]["content"]
        found = _COMPLETION.search(asked)
        said = f"<score>{score(found[2]) if found else 1}</score>"
        message = {"role": "assistant", "content": said}
        answer = {
            "id": "rule",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing of each request."""


class Server(http.server.ThreadingHTTPServer):
    """Takes a whole step's connections at a time."""

    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    with Server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), Judge) as server:
        print(f"a rule judges at http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()
