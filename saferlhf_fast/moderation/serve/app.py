"""The server: routes, metrics, and its start and end.

    saferlhf-fast moderation serve model=runs/moderation/model

    POST /v1/moderations   {"input": "a text"}                  OpenAI's form
    POST /moderate         {"prompt": "…", "response": "…"}     a pair
    GET  /health           200 while the moderator's thread lives, else 503
    GET  /metrics          Prometheus' text form

SIGTERM and SIGINT stop it: no new connection is accepted, what was accepted is answered, and it exits with 0.
Logs and error messages hold no text of a request.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import UserError
from ...runtime import console
from ..moderator import Moderator
from .bodies import Message, Receive, RequestGuard, Scope, Send, error_body
from .queue import QueueFull, ScoringQueue, WorkerDead
from .schemas import BadRequest, moderations, pair_of, parse_json, texts_of, verdict_fields

if TYPE_CHECKING:
    from ...config.moderation_stages import ModerationServeConfig

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
PATHS = ("/v1/moderations", "/moderate", "/health", "/metrics")
"""Paths that metrics name; all others are "other", so that their number does not grow."""


class Metrics:
    """What /metrics shows; each server has its own registry."""

    def __init__(self, queue: Callable[[], int]) -> None:
        """Makes the metrics; `queue` tells how many texts wait."""
        self.registry = registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "moderation_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "moderation_request_seconds", "Time to the answer.", ["path"], registry=registry
        )
        self.texts = prometheus.Counter("moderation_texts", "Texts judged.", registry=registry)
        self.tokens = prometheus.Counter("moderation_tokens", "Tokens judged.", registry=registry)
        self.batches = prometheus.Histogram(
            "moderation_batch_seconds", "Time that a batch takes.", registry=registry
        )
        self.flagged = prometheus.Counter("moderation_flagged", "Texts flagged.", registry=registry)
        self.truncated = prometheus.Counter("moderation_truncated", "Texts cut.", registry=registry)
        waiting = prometheus.Gauge("moderation_queue_texts", "Texts that wait.", registry=registry)
        waiting.set_function(queue)

    def on_batch(self, texts: int, tokens: int, seconds: float) -> None:
        """Counts a batch."""
        self.texts.inc(texts)
        self.tokens.inc(tokens)
        self.batches.observe(seconds)


def create_app(
    moderator: Moderator, cfg: "ModerationServeConfig", token: str | None = None
) -> "CountedRequests":
    """The whole ASGI application; its queue starts and ends with the server.

    Args:
        moderator: Judges.
        cfg: Its settings.
        token: The bearer token; None: none is needed.
    """
    metrics = Metrics(lambda: queue.pending)
    queue = ScoringQueue(moderator, cfg.preset, cfg.queue_size, cfg.wait_ms, metrics.on_batch)
    spec = moderator.model.spec
    about = {"model": Path(cfg.model).expanduser().resolve().parent.name + "/" + Path(cfg.model).name}
    about |= {"label_set": spec.label_set, "preset": cfg.preset}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        queue.start()
        yield
        await asyncio.to_thread(queue.close)

    async def judged(prompts: list[str], responses: list[str]) -> list[Any]:
        verdicts = await asyncio.wrap_future(queue.submit(prompts, responses))
        metrics.flagged.inc(sum(verdict.flagged for verdict in verdicts))
        metrics.truncated.inc(sum(verdict.truncated for verdict in verdicts))
        return verdicts

    async def moderate(fields: dict[str, Any]) -> dict[str, Any]:
        prompt, response = pair_of(fields)
        return verdict_fields((await judged([prompt], [response]))[0], about)

    async def v1_moderations(fields: dict[str, Any]) -> dict[str, Any]:
        texts = texts_of(fields, min(cfg.max_inputs, cfg.queue_size))
        return moderations(await judged([""] * len(texts), texts), about)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_routes(app, {"/moderate": moderate, "/v1/moderations": v1_moderations})
    _add_state(app, queue, metrics, {**about, "threshold_version": moderator.calibration.version})
    return CountedRequests(RequestGuard(app, cfg.max_body, token), metrics)


def _add_routes(app: FastAPI, handlers: dict[str, Handler]) -> None:
    """Adds the routes that judge, and answers for what can go wrong."""

    def route(path: str, handler: Handler) -> None:
        @app.post(path)
        async def judge(request: Request) -> JSONResponse:
            return JSONResponse(await handler(parse_json(await request.body())))

    for path, handler in handlers.items():
        route(path, handler)

    @app.exception_handler(BadRequest)
    async def bad_request(_: Request, error: BadRequest) -> Response:
        return _error(error.status, error.message, error.param, error.code)

    @app.exception_handler(QueueFull)
    async def queue_full(_: Request, error: QueueFull) -> Response:
        seconds = str(error.retry_after)
        message = f"the queue is full; try again in {seconds} seconds"
        return _error(429, message, None, "queue_full", {"Retry-After": seconds})

    @app.exception_handler(WorkerDead)
    async def worker_dead(_: Request, error: WorkerDead) -> Response:
        return _error(503, str(error), None, "worker_dead")

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> Response:
        message = f"the server failed on this request ({type(error).__name__})"
        return _error(500, message, None, "internal_error")

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return _error(error.status_code, str(error.detail), None, code, dict(error.headers or {}))


def _add_state(app: FastAPI, queue: ScoringQueue, metrics: Metrics, about: dict[str, str]) -> None:
    """Adds /health and /metrics."""

    @app.get("/health")
    async def health() -> Response:
        if not queue.alive:
            return _error(503, "the moderator's thread has ended", None, "worker_dead")
        return JSONResponse({"status": "ok", "queued": queue.pending, **about})

    @app.get("/metrics")
    async def prometheus_metrics() -> Response:
        text = prometheus.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)


def _error(
    status: int, message: str, param: str | None, code: str | None, headers: dict[str, str] | None = None
) -> Response:
    body = error_body(status, message, param, code)
    return Response(body, status, headers, media_type="application/json")


class CountedRequests:
    """ASGI middleware: counts and times what the application answers."""

    def __init__(self, app: RequestGuard, metrics: Metrics) -> None:
        """Wraps an application."""
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection event of the server."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        started, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - started)


def read_token(path: str | None) -> str | None:
    """The bearer token that a file holds; None without a file.

    Raises:
        UserError: The file cannot be read, is empty, or holds more than one word of ASCII.
    """
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"token_file: {path}: expected a file with a token, cannot read it: {reason}"
        ) from None
    if not text:
        raise UserError(f"token_file: {path}: expected a token, got an empty file")
    if len(text.split()) > 1 or not text.isascii() or not text.isprintable():
        raise UserError(f"token_file: {path}: expected one word of ASCII characters, got something else")
    return text


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        UserError: The port is in use, or the host is not of this machine.
    """
    opened = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, proto)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(2048)
    except OSError as error:
        if opened is not None:
            opened.close()
        name = "host" if isinstance(error, socket.gaierror) else "port"
        raise UserError(
            f"{name}: {host}:{port}: expected an address to listen on, got: {error.strerror or error}"
        ) from None
    return opened


def server_of(app: CountedRequests, drain_seconds: int) -> uvicorn.Server:
    """The HTTP server of an application; `run(sockets=[…])` blocks until it is told to end."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=drain_seconds,
        )
    )


def serve(cfg: "ModerationServeConfig") -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        cfg: Its settings.

    Raises:
        UserError: The model is no moderator, the token cannot be read, or the port is in use.
    """
    token = read_token(cfg.token_file)
    with listening(cfg.host, cfg.port) as sock:
        moderator = Moderator.from_pretrained(
            cfg.model,
            batch_tokens=cfg.batch_tokens,
            trust_remote_code=cfg.trust_remote_code,
            allow_pickle=cfg.allow_pickle,
        )
        server = server_of(create_app(moderator, cfg, token), cfg.drain_seconds)
        if token is None and cfg.host not in ("127.0.0.1", "::1", "localhost"):
            console.say(f"warning: {cfg.host} can be reached by others and no token_file is given")
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        version = moderator.calibration.version
        console.say(f"serving on http://{shown}:{port}, preset {cfg.preset}, thresholds {version}")
        for number in (signal.SIGTERM, signal.SIGINT):
            # the server raises the signal again when it has drained, and that must not end in an error
            signal.signal(number, lambda *_: None)
        server.run(sockets=[sock])
