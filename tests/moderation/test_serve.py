"""`moderation serve` over a real socket: answers, batches, errors, limits, the token, the end, and load."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import kit
import pytest
import torch

from saferlhf_fast.config.stages import ModerationServeConfig
from saferlhf_fast.data.harm_taxonomy import OPENAI, PKU
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.moderator_files import moderator_from_backbone, save_moderator
from saferlhf_fast.models.moderator_spec import Calibration, ModeratorSpec
from saferlhf_fast.models.tokenizer import load_tokenizer
from saferlhf_fast.moderation import Moderator

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is not installed")
from saferlhf_fast.moderation.serve import app as serve_app  # noqa: E402

MAX_BODY = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("serve")
    base = str(kit.make_model(made / "base"))
    model = moderator_from_backbone(base, ModeratorSpec("pku", PKU, refusal=True, max_length=100))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.normal_(0, 0.5)
    thresholds = {name: 0.05 if i % 2 else 0.95 for i, name in enumerate(PKU)}
    calibration = Calibration(thresholds={"balanced": thresholds, "strict": {"unsafe": 0.001}})
    save_moderator(made / "model", model, load_tokenizer(base), calibration)
    return str(made / "model")


@pytest.fixture(scope="module")
def moderator(folder):
    return Moderator.from_pretrained(folder, batch_tokens=512)


@contextlib.contextmanager
def serving(moderator, token=None, **settings):
    """-> (port, server, thread): a server on a thread of this process."""
    cfg = ModerationServeConfig(model="runs/guard/model", max_body=MAX_BODY, **settings)
    sock = serve_app.listening("127.0.0.1", 0)
    server = serve_app.server_of(serve_app.create_app(moderator, cfg, token), 20)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield sock.getsockname()[1], server, thread
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(moderator):
    with serving(moderator, max_inputs=5) as (number, _, _):
        yield number


def ask(port, path, body=None, headers=None, method=None, timeout=60):
    """-> (status, headers, the answer's JSON or text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        raw = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        chunked = raw is not None and not isinstance(raw, bytes)
        connection.request(
            method or ("GET" if raw is None else "POST"), path, raw, headers or {}, encode_chunked=chunked
        )
        answer = connection.getresponse()
        text = answer.read().decode()
        is_json = answer.headers["content-type"].startswith("application/json")
        return answer.status, answer.headers, json.loads(text) if is_json else text
    finally:
        connection.close()


def text_of(rng):
    return " ".join(rng.choice(kit.WORDS) for _ in range(rng.choice([1, 3, 20, 60, 150])))


def same(answer, verdict):
    """Whether an answer says what a verdict says."""
    near = lambda a, b: a == pytest.approx(b, abs=1e-5)  # noqa: E731
    assert near(answer["unsafe"], verdict.unsafe) and near(answer["safe"], 1 - verdict.unsafe)
    assert near(answer["severity_distribution"], list(verdict.severity_distribution))
    assert near(answer["expected_severity"], verdict.expected_severity)
    assert near(answer["categories"], verdict.categories) and answer["flags"] == verdict.flags
    assert (answer["flagged"], answer["truncated"]) == (verdict.flagged, verdict.truncated)
    assert answer["threshold_version"] == verdict.threshold_version != "untuned"


def test_every_input_has_its_own_answer_in_order(port, moderator):
    rng = random.Random(1)
    texts = [text_of(rng), "", "é 世界 🙂", text_of(rng), "harm " * 400]
    status, _, got = ask(port, "/v1/moderations", {"model": "omni-moderation-latest", "input": texts})
    assert status == 200 and got["id"].startswith("modr-") and got["model"] == "guard/model"
    assert len(got["results"]) == 5
    for text, result in zip(texts, got["results"], strict=True):
        verdict = moderator([""], [text])[0]
        same(result["moderator"], verdict)
        for key in ("categories", "category_scores", "category_applied_input_types"):
            assert set(result[key]) == set(OPENAI)
        assert result["category_scores"]["sexual"] == pytest.approx(
            verdict.categories["Sexual Content"], abs=1e-5
        )
        assert result["categories"]["sexual"] is verdict.flags["Sexual Content"]
        drugs = [n for n in PKU if n in ("Copyright", "Drugs", "Cybercrime") or "Crime" in n or "Order" in n]
        assert result["category_scores"]["illicit"] == pytest.approx(
            max(verdict.categories[n] for n in drugs), abs=1e-5
        )
        assert result["unsupported_categories"] == [
            "harassment/threatening", "hate/threatening", "self-harm/instructions", "self-harm/intent"
        ]  # fmt: skip
        assert result["flagged"] is (verdict.flagged or any(verdict.flags.values()))
    assert got["results"][-1]["moderator"]["truncated"]
    one = ask(port, "/v1/moderations", {"input": texts[0]})[2]["results"]
    parts = [{"type": "text", "text": "stop"}, {"type": "text", "text": "harm"}]
    joined = ask(port, "/v1/moderations", {"input": parts})[2]["results"]
    assert len(one) == len(joined) == 1
    same(one[0]["moderator"], moderator([""], [texts[0]])[0])
    same(joined[0]["moderator"], moderator([""], ["stop\nharm"])[0])


def test_many_clients_among_bad_ones_get_the_answer_that_they_get_alone(moderator):
    with serving(moderator) as (port, _, _):
        results = under_load(port, 2, clients=32, each=2, bad=(0.2, 0.1))
        assert ask(port, "/health")[2]["queued"] == 0
    assert {kind for kind, *_ in results} == {"good", "malformed", "too large"}
    for kind, body, status, answer, _ in results:
        require_right(moderator, kind, body, status, answer)
        assert status != 429
        assert kind != "good" or (answer["preset"], answer["label_set"]) == ("balanced", "pku")


PAIR = {"prompt": "stop", "response": "harm"}
WRONG = [
    ("/v1/moderations", b"{", 400, None),
    ("/v1/moderations", b"", 400, None),
    ("/v1/moderations", b'{"input": "\xff"}', 400, None),
    ("/v1/moderations", b"[" * 15000, 400, None),
    ("/v1/moderations", b"[]", 422, None),
    ("/v1/moderations", {}, 422, "input"),
    ("/v1/moderations", {"input": None}, 422, "input"),
    ("/v1/moderations", {"input": []}, 422, "input"),
    ("/v1/moderations", {"input": ["a"] * 6}, 422, "input"),
    ("/v1/moderations", {"input": ["a", 3]}, 422, "input[1]"),
    ("/v1/moderations", {"input": ["a", ["b"]]}, 422, "input[1]"),
    ("/v1/moderations", {"input": "a", "model": 3}, 422, "model"),
    ("/v1/moderations", {"input": "\ud800"}, 422, "input[0]"),
    ("/v1/moderations", {"input": [{"type": "text", "text": "a"}, "b"]}, 422, "input[1]"),
    ("/v1/moderations", {"input": [{"type": "text"}]}, 422, "input[0].text"),
    ("/v1/moderations", {"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, 422, "input[0].type"),
    ("/moderate", {"prompt": "secretword"}, 422, "response"),
    ("/moderate", {"response": "secretword"}, 422, "prompt"),
    ("/moderate", {"prompt": ["secretword"], "response": "a"}, 422, "prompt"),
    ("/moderate", {"prompt": "a", "response": None}, 422, "response"),
    ("/moderate", b"x" * (MAX_BODY + 1), 413, None),
    ("/nothing", PAIR, 404, None),
    ("/moderate", None, 405, None),
]


def test_bad_requests_have_openais_form_and_name_the_field(port, capfd):
    for path, body, status, param in WRONG:
        got, headers, answer = ask(port, path, body)
        assert (got, answer["error"]["param"]) == (status, param), (path, str(body)[:60], answer)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == "invalid_request_error" and "secretword" not in str(answer)
        assert param is None or answer["error"]["message"].startswith(param + ": expected")
    chunks = (b"x" * 65536 for _ in range(160))
    assert ask(port, "/moderate", chunks)[0] == 413, "10 MB in chunks, without a length"
    exact = json.dumps(PAIR).encode()
    exact += b" " * (MAX_BODY - len(exact))
    assert ask(port, "/moderate", exact)[0] == ask(port, "/moderate", iter([exact]))[0] == 200
    metrics = ask(port, "/metrics")[2]
    assert 'moderation_requests_total{path="/moderate",status="422"} 4.0' in metrics
    assert "nothing" not in metrics and "moderation_queue_texts 0.0" in metrics
    logged = capfd.readouterr()
    assert "secretword" not in logged.out + logged.err


def failing(monkeypatch):
    """Makes texts with `poison` raise when they are judged, and those with `spoiled` when encoded."""
    judge, encode = Moderator.probabilities, Moderator.encode

    def probabilities(self, encoded, prompts, responses, source=None):
        if any("poison" in text for text in responses):
            raise RuntimeError("cannot judge: " + " ".join(responses))
        if any("fatal" in text for text in responses):
            raise SystemExit
        return judge(self, encoded, prompts, responses, source)

    def encode_or_not(self, prompts, responses):
        if any("spoiled" in text for text in responses):
            raise ValueError(responses[0])
        return encode(self, prompts, responses)

    monkeypatch.setattr(Moderator, "probabilities", probabilities)
    monkeypatch.setattr(Moderator, "encode", encode_or_not)


def test_an_exception_settles_its_own_request_and_a_dead_worker_is_seen(moderator, monkeypatch, capfd):
    failing(monkeypatch)
    with serving(moderator, wait_ms=300) as (port, _, _):
        got = {}

        def client(i, word):
            got[i] = ask(port, "/moderate", {"prompt": "a", "response": word})

        words = ["stop", "poison", "harm", "spoiled", "stop harm"]
        threads = [threading.Thread(target=client, args=item) for item in enumerate(words)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [got[i][0] for i in range(5)] == [200, 500, 200, 500, 200]
        assert got[1][2]["error"]["type"] == "server_error" and "poison" not in str(got[1][2])
        same(got[4][2], moderator(["a"], ["stop harm"])[0])
        assert ask(port, "/health")[0] == 200
        assert ask(port, "/moderate", {"prompt": "a", "response": "fatal"})[0] == 503
        assert ask(port, "/health")[0] == 503 and ask(port, "/moderate", PAIR)[0] == 503
    logged = capfd.readouterr()
    assert "poison" not in logged.err + logged.out and "spoiled" not in logged.err + logged.out


def test_a_full_queue_answers_429_and_the_end_drains(moderator, monkeypatch):
    judge, gate, inside = Moderator.probabilities, threading.Event(), threading.Event()

    def slow(self, *args):
        inside.set()
        assert gate.wait(30)
        return judge(self, *args)

    with monkeypatch.context() as patch, serving(moderator, queue_size=2, wait_ms=0) as (port, server, end):
        patch.setattr(Moderator, "probabilities", slow)
        answers = []
        threads = []
        for _ in range(2):
            threads.append(threading.Thread(target=lambda: answers.append(ask(port, "/moderate", PAIR))))
            threads[-1].start()
        assert inside.wait(30)
        while "moderation_queue_texts 2.0" not in ask(port, "/metrics")[2]:
            time.sleep(0.01)
        status, headers, answer = ask(port, "/moderate", PAIR)
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert answer["error"]["type"] == "rate_limit_error"
        server.should_exit = True
        time.sleep(0.3)
        assert end.is_alive() and not answers
        gate.set()
        for thread in [*threads, end]:
            thread.join(20)
        assert [status for status, _, _ in answers] == [200, 200]


def test_a_token_and_a_preset(moderator):
    with serving(moderator, token="s3cret", preset="strict") as (port, _, _):
        for given in (None, "Bearer", "Bearer other", "Basic s3cret", "s3cret"):
            status, headers, answer = ask(port, "/moderate", PAIR, {"Authorization": given} if given else {})
            assert status == 401 and answer["error"]["type"] == "authentication_error"
            assert headers["www-authenticate"] == "Bearer"
        status, _, got = ask(port, "/moderate", PAIR, {"Authorization": "bearer s3cret"})
        assert status == 200 and got["preset"] == "strict"
        same(got, moderator(["stop"], ["harm"], preset="strict")[0])
        assert ask(port, "/health")[0] == 200 and ask(port, "/metrics")[0] == 401


def test_what_cannot_be_served_is_one_line(folder, tmp_path, capsys):
    empty, two = tmp_path / "empty", tmp_path / "two"
    empty.write_text(" \n")
    two.write_text("one two")
    with serve_app.listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        cases = {
            f"model={folder} port={port}": f"port: 127.0.0.1:{port}: expected an address",
            f"model={folder} port=70000": "port: ",
            f"model={folder} port=0 token_file={empty}": "expected a token, got an empty file",
            f"model={folder} port=0 token_file={two}": "expected one word",
            f"model={folder} port=0 token_file={tmp_path}/none": "expected a file with a token",
            f"model={tmp_path}/none": "model: ",
            f"model={Path(folder).parent}/base": "expected a moderator",
            f"model={folder} preset=loose": "preset: ",
        }
        for words, expected in cases.items():
            assert kit.main("moderation", "serve", *words.split()) == 2, words
            last = capsys.readouterr().err.strip().splitlines()
            assert len(last) == 1 and expected in last[0], (words, last)
    with pytest.raises(UserError, match="host: "):
        serve_app.listening("no.such.host.invalid", 0)


CLIENTS, EACH = 200, int(os.environ.get("SERVE_REQUESTS", "5"))


def load_of(rng, malformed, large):
    """-> (kind, body) of one request; the shares of malformed ones and of 10 MB in chunks are given."""
    draw = rng.random()
    if draw < malformed:
        return "malformed", rng.choice([b"{", b"\xff", {"prompt": "a"}, {"prompt": 1, "response": "b"}, [1]])
    if draw < malformed + large:
        return "too large", None
    return "good", {"prompt": text_of(rng), "response": text_of(rng)}


def memory_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def require_right(moderator, kind, body, status, answer):
    """A well-formed request has the answer that it gets alone or 429, a bad one its own status."""
    if kind == "too large":
        assert status == 413
    elif kind == "malformed":
        assert status in (400, 422)
    elif status != 429:
        assert status == 200
        same(answer, moderator([body["prompt"]], [body["response"]])[0])


def under_load(port, seed, clients=CLIENTS, each=EACH, bad=(0.05, 0.02)):
    """-> [(kind, body, status, answer, seconds)] of many clients at once."""
    results = []

    def client(number):
        rng = random.Random(seed * 1000 + number)
        for _ in range(each):
            kind, body = load_of(rng, *bad)
            sent = (b"x" * 65536 for _ in range(160)) if kind == "too large" else body
            started = time.monotonic()
            status, _, answer = ask(port, "/moderate", sent, timeout=300)
            results.append((kind, body, status, answer, time.monotonic() - started))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_clients_get_right_answers_in_flat_memory_and_sigterm_drains(folder, moderator):
    words = [sys.executable, "-m", "saferlhf_fast", "moderation", "serve", f"model={folder}", "port=0"]
    process = subprocess.Popen([*words, "queue_size=150"], stdout=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
        memory, table = [], []
        for seed in range(3):
            results = under_load(port, seed)
            memory.append(memory_mb(process.pid))
            for kind, body, status, answer, _ in results:
                require_right(moderator, kind, body, status, answer)
            seconds = sorted(r[4] for r in results if r[2] == 200)
            cuts = statistics.quantiles(seconds, n=100)
            counts = [sum(r[2] == status for r in results) for status in (200, 429, 413)]
            table.append((len(results), *counts, cuts[49], cuts[98], memory[-1]))
            assert counts[0] > 50 and counts[2] > 0
        print("\nrequests    200    429    413   p50 s   p99 s  RSS MB")
        for row in table:
            print("{:8d} {:6d} {:6d} {:6d} {:7.2f} {:7.2f} {:7.0f}".format(*row))
        assert memory[-1] < memory[0] + 40, "memory grows with the requests"
        late = []
        threads = [
            threading.Thread(target=lambda: late.append(ask(port, "/moderate", PAIR)[0])) for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        while "moderation_queue_texts 0.0" in ask(port, "/metrics")[2] and not late:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert late == [200] * 20 and process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            ask(port, "/health")
    finally:
        process.kill()
