"""Responses from a vLLM server over its OpenAI-compatible HTTP interface; it gets new weights as files.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm

Every sequence is one request with its own seed and limit; many run at a time, and the server batches them.
After an update the weights are written to a folder that the server sees under the same path, and a request
makes it read them (`/collective_rpc` reload_weights, `/reset_prefix_cache`; these need its development mode,
and such a server must not be reachable by others). No process group spans trainer and server. The trainer
needs no vLLM, only the server does.

Leaves out: transfer by NCCL or CUDA IPC, and starting the server. Written after the source of vLLM 0.33.
"""

import http.client
import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...models.causal_lm import save_causal_lm
from ...models.sampling_distribution import plain
from ...runtime import engine
from ..types import Response
from .gathered_weights import gathered_lm
from .stop_strings import split_ends
from .vllm_tokens import refuse_spare, request_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...config.sections import Sampling
    from . import SamplingActor

AT_ONCE = 256
"""Requests that each rank runs at a time."""
TRIES = 4
"""How often a request is sent, when the server does not answer or answers that it is busy."""
PAUSE = 1.0
"""Wait before the second try, doubled before each further one (seconds)."""
TIMEOUT = 3600.0
"""Longest wait for an answer (seconds)."""


class ServedVLLM:
    """A rollout engine (see saferlhf_fast.rollout.engines)."""

    def __init__(
        self,
        actor: "SamplingActor",
        tokenizer: "PreTrainedTokenizerBase",
        ends: Sequence[int | str],
        sampling: "Sampling",
    ) -> None:
        """Takes what the engine samples with.

        Args:
            actor: The policy that samples.
            tokenizer: Its tokenizer.
            ends: Ids that end a response, and end marks of several tokens.
            sampling: The distribution and its limits.

        Raises:
            UserError: The server does not answer, reports log-probs of another distribution, or cannot
                exclude all rows without a token.
        """
        self.actor, self.tokenizer, self.sampling = actor, tokenizer, sampling
        self.ends, marks = split_ends(ends)
        self.stop = [*sampling.stop, *marks]
        self.server = Server(sampling.server, getattr(actor.module.lm.config, "_name_or_path", "") or "MODEL")
        self.model = self.server.request("/v1/models")["data"][0]["id"]
        self.token_fields = request_fields(tokenizer, actor.module.lm, "vllm-server")
        self._check_log_probs()
        self.folder, self.pushed = sampling.server_weights, False
        self.own_folder: tempfile.TemporaryDirectory[str] | None = None

    def _check_log_probs(self) -> None:
        """The server must report log-probs of the distribution it samples, not of the model's plain one."""
        if plain(self.sampling) and self.sampling.temperature == 1.0 and not self.token_fields:
            return
        config = self.server.request("/server_info?config_format=json")["vllm_config"]
        mode = config.get("model_config", {}).get("logprobs_mode") if isinstance(config, dict) else None
        if mode != "processed_logprobs":
            raise UserError(
                f"sampling.server: expected a server with --logprobs-mode processed_logprobs, got {mode}; "
                f"{self.server.advice}"
            )

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]
    ) -> list[Response]:
        """See RolloutEngine."""
        if not self.pushed:
            self.refresh()
        with ThreadPoolExecutor(max_workers=min(AT_ONCE, max(1, len(prompts)))) as pool:
            return list(pool.map(self._one, prompts, seeds, limits))

    def _one(self, prompt: list[int], seed: int, limit: int) -> Response:
        settings = self.sampling
        response = self.server.request(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": limit,
                "seed": seed % (1 << 63),
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
                "min_p": 0.0,
                "repetition_penalty": settings.repetition_penalty,
                "stop": self.stop,
                "stop_token_ids": self.ends,
                "ignore_eos": True,  # stop_token_ids has all ends
                "include_stop_str_in_output": True,
                "skip_special_tokens": False,
                "add_special_tokens": False,
                "logprobs": 0,
                "return_token_ids": True,
                **self.token_fields,
            },
        )
        choice = response["choices"][0]
        ids, logp = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or logp is None or len(logp) != len(ids):
            raise UserError(
                f"sampling.server: expected token_ids and as many token_logprobs, got {_short(choice)}; "
                f"{self.server.advice}"
            )
        refuse_spare(ids, self.token_fields, "vllm-server")
        return Response(ids, logp, choice["finish_reason"] == "stop")

    def refresh(self) -> None:
        """Writes the weights and makes the server read them; every rank waits for it."""
        if engine.rank() == 0 and self.folder is None:
            self.own_folder = tempfile.TemporaryDirectory(prefix="saferlhf-fast-weights-")
            self.folder = self.own_folder.name
        failed: UserError | None = None
        with gathered_lm(self.actor) as lm:
            if engine.rank() == 0:
                assert self.folder is not None, "rank 0 has a folder for the weights"
                target = Path(self.folder).resolve() / "weights"
                try:
                    save_causal_lm(target, lm, self.tokenizer)
                    self.server.request(
                        "/collective_rpc",
                        {"method": "reload_weights", "kwargs": {"weights_path": str(target)}},
                    )
                    self.server.request("/reset_prefix_cache", {})
                except UserError as error:
                    failed = error
                except OSError as error:
                    failed = UserError(f"sampling.server_weights: {target}: {error}")
        failed = next((error for error in engine.gather_objects(failed) if error is not None), None)
        if failed is not None:  # on every rank, so that none waits for the others
            raise failed
        self.pushed = True

    def close(self) -> None:
        """Deletes a temporary folder of weights; the server keeps running."""
        if self.own_folder is not None:
            self.own_folder.cleanup()
            self.own_folder = self.folder = None


class Server:
    """JSON over HTTP, with retries while the server is unreachable or busy; a refusal is a UserError."""

    def __init__(self, address: str, model: str) -> None:
        self.address = address.rstrip("/")
        self.advice = (
            f"start it with: VLLM_SERVER_DEV_MODE=1 vllm serve {model} --logprobs-mode processed_logprobs "
            "--generation-config vllm"
        )

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Sends a GET, or a POST where there is a body.

        Args:
            path: Of the resource.
            body: Sent as JSON.

        Returns:
            The answer's JSON; {} when it is empty.

        Raises:
            UserError: No answer, an answer that is not JSON, or a refusal.
        """
        data = None if body is None else json.dumps(body).encode()
        message = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(message, timeout=TIMEOUT) as response:
                    text = response.read()
                    return json.loads(text) if text else {}
            except urllib.error.HTTPError as error:
                answer_text = error.read().decode(errors="replace")
                problem = f"{path} answered {error.code}: {_short(answer_text)}"
                if error.code == 404:
                    problem += "; " + self.advice
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                problem = f"no answer ({getattr(error, 'reason', error)}); {self.advice}"
            except json.JSONDecodeError:
                problem = f"{path} answered {_short(text.decode(errors='replace'))}, expected JSON"
                break
        raise UserError(f"sampling.server: {self.address}: {problem}")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"
