"""A server on this machine that speaks to OpenAI's client as a judge does, with answers that the test wants."""

import contextlib
import http.server
import json
import math
import threading


class Server(http.server.ThreadingHTTPServer):
    """Answers requests with `answers` in turn, the last one from then on."""

    daemon_threads = True
    request_queue_size = 128  # connections at a time

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.keys = list(answers), [], []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that gave up


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            answer = self.server.answers[min(len(self.server.requests), len(self.server.answers)) - 1]
        status, text, *more = answer(body) if callable(answer) else answer
        sent = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (more[0] if more else QUICK).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(sent) + (5 if status == CUT else 0)))
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = True

    def log_message(self, *args):
        pass


QUICK = {"Retry-After-Ms": "1"}  # the client waits so long, and not half a second
CUT = 299  # a status after which the connection ends too early


def says(content, first=(), finish="stop"):
    logprobs = None
    if first:
        token = {"token": "x", "logprob": -1.0, "bytes": None}
        tops = [{"token": name, "logprob": math.log(share), "bytes": None} for name, share in first]
        logprobs = {"content": [{**token, "top_logprobs": tops}], "refusal": None}
    choice = {"index": 0, "finish_reason": finish, "logprobs": logprobs}
    choice["message"] = {"role": "assistant", "content": content, "refusal": None}
    usage = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    return 200, json.dumps({**head, "choices": [choice], "usage": usage})


@contextlib.contextmanager
def serving(*answers):
    with Server(*answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
