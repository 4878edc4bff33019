"""A replacement for a vLLM server: its routes, answered by a tiny model that loads weights on request."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import generation_kit
import torch


class FakeServer(ThreadingHTTPServer):
    """requests: (path, body) in the order of arrival; failing: how many of the next answers are 503."""

    daemon_threads = True

    def __init__(self, lm, mode="processed_logprobs"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lm, self.mode, self.requests, self.failing, self.lock = lm, mode, [], 0, threading.Lock()
        self.development = self.follows_requests = True

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
        server, path = self.server, self.path.partition("?")[0]
        with server.lock:
            server.requests.append((path, body))
            fails = server.failing > 0
            server.failing -= fails
        if fails:
            return self.send(503, {"error": "overloaded"})
        if path == "/v1/models":
            return self.send(200, {"data": [{"id": "tiny"}]})
        if path == "/v1/completions":
            return self.complete(body)
        if not server.development:
            return self.send(404, {"detail": "Not Found"})
        if path == "/server_info":
            return self.send(200, {"vllm_config": {"model_config": {"logprobs_mode": server.mode}}})
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            from transformers import AutoModelForCausalLM

            server.lm = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            return self.send(200, {"results": [None]})
        if path == "/reset_prefix_cache":
            return self.send(200, {"success": True})
        return self.send(400, {"error": f"unknown {path}"})

    def complete(self, body):
        if body["max_tokens"] > 200:
            return self.send(400, {"error": {"message": "this model's maximum context length is 200 tokens"}})
        # the answers do not arrive in the order of the requests
        time.sleep(0.02 * (body["seed"] % 3 == 0))
        sampling = generation_kit.settings(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            repetition_penalty=body["repetition_penalty"],
        )
        allowed, spare = body.get("allowed_token_ids"), [int(i) for i in body.get("logit_bias", ())]
        if allowed is not None:
            spare = sorted(set(range(self.server.lm.config.vocab_size)).difference(allowed))
        with torch.no_grad():
            ids, logp, ended = generation_kit.naive(
                self.server.lm,
                body["prompt"],
                body["seed"],
                body["max_tokens"],
                body["stop_token_ids"],
                sampling,
                torch.tensor(spare) if spare and self.server.follows_requests else None,
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
    server = FakeServer(lm, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
