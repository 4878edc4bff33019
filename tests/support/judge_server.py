"""A local judge behind OpenAI's chat completions, well-behaved or not, that counts its own requests."""

import json
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FENCED = re.compile(r"<<<(PROMPT|ANSWER A|ANSWER B) (\w{16})>>>\n(.*?)\n<<<END OF \1 \2>>>", re.DOTALL)


def texts_of(chat):
    """{"PROMPT": …, "ANSWER A": …, "ANSWER B": …} as a judge that minds the marks reads them."""
    return {name: text for name, _, text in FENCED.findall(chat[1]["content"])}


def verdict(word):
    return f'Both were read. {{"verdict": "A"}} would be rash.\n{{"verdict": "{word}"}}'


class Server:
    """`behave(number, chat)` returns the judge's words, or (status, headers, body), or None: it stalls."""

    def __init__(self, behave):
        self.behave, self.requests, self.statuses = behave, 0, Counter()
        self.lock, self.ended = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests += 1
                    number = outer.requests
                outer.last = {"path": self.path, "headers": dict(self.headers), "body": body}
                said = outer.behave(number, body["messages"])
                if said is None:
                    outer.ended.wait(30)
                    said = 500, {}, ""
                status, headers, answer = (200, {}, completion(said)) if isinstance(said, str) else said
                outer.statuses[status] += 1
                data = answer.encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None  # a client that was killed
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()


def completion(text, ended="stop", usage=(40, 10)):
    message = {"role": "assistant", "content": text}
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps({"choices": [{"message": message, "finish_reason": ended}], "usage": counts})


def longer(number, chat):
    """A judge with an opinion: the longer answer is better, equal lengths tie."""
    texts = texts_of(chat)
    a, b = len(texts["ANSWER A"]), len(texts["ANSWER B"])
    return verdict("tie" if a == b else "A" if a > b else "B")


def at_random(number, chat):
    return verdict(random.Random(json.dumps(chat)).choice("AB"))


def slow(behave, seconds):
    def later(number, chat):
        time.sleep(seconds)
        return behave(number, chat)

    return later
