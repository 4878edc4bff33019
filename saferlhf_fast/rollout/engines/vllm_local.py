"""Responses from vLLM in this process, on the trainer's GPU; every rank has an engine of its own.

vLLM keeps a second copy of the weights in the layout of its kernels. It sleeps during training: its weights
and its cache leave the GPU. For a rollout it wakes, takes the trainer's current weights, samples and sleeps
again. Nothing is read from disk: it starts with random weights from the model's configuration.

Needs: pip install 'vllm>=0.33', a GPU, and versions of torch and transformers that this vLLM accepts.
Leaves out: tensor parallelism. Written after the source of vLLM 0.33 and not run.
"""

import contextlib
import copy
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import UserError
from ...models.lora import plain as unwrapped
from ...models.lora import plain_state
from ...runtime import engine
from ..types import Response
from .gathered_weights import gathered_lm
from .stop_strings import split_ends
from .vllm_tokens import refuse_spare, request_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import CompletionOutput, SamplingParams

    from ...config.sections import Sampling
    from . import SamplingActor


class LocalVLLM:
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
            UserError: vLLM cannot be imported, or cannot exclude all rows without a token.
        """
        # In this process, not in a child: it gets the weights as tensors. Read when vllm is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"sampling.engine: vllm cannot be imported ({error}); expected: pip install 'vllm>=0.33'"
            ) from error
        self.actor, self.sampling, self.vllm = actor, sampling, vllm
        self.ends, marks = split_ends(ends)
        self.stop = [*sampling.stop, *marks]
        self.token_fields = request_fields(tokenizer, actor.module.lm, "vllm")
        self.folder = tempfile.TemporaryDirectory(prefix="saferlhf-fast-vllm-")
        lm = unwrapped(actor.module.lm)
        config = copy.deepcopy(lm.config)  # with the model's current vocabulary
        config.architectures = [type(lm).__name__]
        config.save_pretrained(self.folder.name)
        tokenizer.save_pretrained(self.folder.name)
        with launcher_variables():
            self.llm = vllm.LLM(
                model=self.folder.name,
                dtype=str(lm.dtype).removeprefix("torch."),
                load_format="dummy",
                max_model_len=-1,
                gpu_memory_utilization=sampling.memory_share("vllm"),
                enable_sleep_mode=True,
                seed=0,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                tensor_parallel_size=1,
                distributed_executor_backend="external_launcher",
            )
        self.llm.sleep(level=2)

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]
    ) -> list[Response]:
        """See RolloutEngine."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM needs the memory that torch caches
        self.llm.wake_up(tags=["weights"])
        with gathered_lm(self.actor) as lm:
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": iter(plain_state(lm).items())}
            )
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()
        answers = (
            self.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [self._parameters(seed, limit) for seed, limit in zip(seeds, limits)],
                use_tqdm=False,
            )
            if prompts
            else []
        )
        self.llm.sleep(level=2)
        return [self._response(answer.outputs[0]) for answer in answers]

    def _parameters(self, seed: int, limit: int) -> "SamplingParams":
        settings = self.sampling
        return self.vllm.SamplingParams(
            n=1,
            seed=seed % (1 << 63),
            max_tokens=limit,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=0.0,
            repetition_penalty=settings.repetition_penalty,
            stop=self.stop or None,
            stop_token_ids=self.ends,
            ignore_eos=True,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            detokenize=bool(self.stop),
            logprobs=0,
            **self.token_fields,
        )

    def _response(self, output: "CompletionOutput") -> Response:
        ids = list(output.token_ids)
        refuse_spare(ids, self.token_fields, "vllm")
        logp = [by_token[token].logprob for token, by_token in zip(ids, output.logprobs)]
        return Response(ids, logp, output.finish_reason == "stop")

    def refresh(self) -> None:
        """Nothing to do: `generate` takes the weights, since a sleeping engine has none."""

    def close(self) -> None:
        """Drops vLLM's engine and its temporary folder."""
        self.llm = None
        self.folder.cleanup()


@contextlib.contextmanager
def launcher_variables() -> Iterator[None]:
    """Context with a launcher's environment variables, which vLLM reads.

    A single process has none (see `engine.start`).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    wanted = {
        "RANK": engine.rank(),
        "LOCAL_RANK": 0,
        "WORLD_SIZE": engine.world_size(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    missing = {name: str(value) for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:  # a child process would think that a launcher started it
            del os.environ[name]
