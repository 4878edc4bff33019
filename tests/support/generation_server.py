"""A stand-in for a vLLM server: its routes, answered by a tiny model that reads the weights it is told to
read.
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import generation_kit
import torch


class Stand(ThreadingHTTPServer):
    """requests: (path, body) in the order in which they came; failing: answers of 503 that are still to be
    given.
    """

    daemon_threads = True

    def __init__(self, lm, mode="processed_logprobs"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lm, self.mode, self.requests, self.failing, self.lock = lm, mode, [], 0, threading.Lock()
        self.development = True

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path):
        return [body for at, body in self.requests if at == path]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.respond(None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.respond(body)

    def respond(self, body):
        stand, path = self.server, self.path.partition("?")[0]
        with stand.lock:
            stand.requests.append((path, body))
            fails = stand.failing > 0
            stand.failing -= fails
        if fails:
            return self.send(503, {"error": "overloaded"})
        if path == "/v1/models":
            return self.send(200, {"data": [{"id": "tiny"}]})
        if path == "/v1/completions":
            return self.complete(body)
        if not stand.development:
            return self.send(404, {"detail": "Not Found"})
        if path == "/server_info":
            return self.send(200, {"vllm_config": {"model_config": {"logprobs_mode": stand.mode}}})
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            from transformers import AutoModelForCausalLM

            stand.lm = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            return self.send(200, {"results": [None]})
        if path == "/reset_prefix_cache":
            return self.send(200, {"success": True})
        return self.send(400, {"error": f"unknown {path}"})

    def complete(self, body):
        if body["max_tokens"] > 200:
            return self.send(400, {"error": {"message": "this model's maximum context length is 200 tokens"}})
        # answers do not come in the order of the requests
        time.sleep(0.02 * (body["seed"] % 3 == 0))
        sampling = generation_kit.settings(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            repetition_penalty=body["repetition_penalty"],
        )
        with torch.no_grad():
            ids, logp, ended = generation_kit.naive(
                self.server.lm,
                body["prompt"],
                body["seed"],
                body["max_tokens"],
                body["stop_token_ids"],
                sampling,
            )
        choice = {
            "token_ids": ids,
            "finish_reason": "stop" if ended else "length",
            "logprobs": {"token_logprobs": logp},
        }
        self.send(200, {"choices": [choice]})

    def send(self, code, answer):
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(lm, **settings):
    stand = Stand(lm, **settings)
    thread = threading.Thread(target=stand.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stand
    finally:
        stand.shutdown()
        stand.server_close()
        thread.join()
