"""Responses through transformers' continuous batching: a paged cache, changing batches, CUDA graphs on a GPU.

transformers samples with one random generator for the batch and applies no repetition penalty there. Here our
own logits processor chooses the tokens, as in hf_generate.py: the numbers of each sequence are in a table on
the device, log-probs and tokens are written to others, so that a captured graph can be replayed. The trained
weights are used in place; cache and graphs live for one `generate`, since the update needs their memory.
Without flash-attn transformers uses SDPA with a dense mask over all sequences of a step and captures no
graphs, which is far slower. The same holds on a CPU, where this engine only serves tests.

Leaves out: weights sharded by ZeRO-3 while generating (they are gathered), architectures whose attention is
not transformers' own.
Shapes: legend in rollout/types.py; N counts the rows of a step, T the steps that a sequence may have.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from ...errors import UserError
from ...models import attention, rotary
from ...models.lora import plain as unwrapped
from ...models.row_form import architecture_form
from ...models.sampling_distribution import pick, sampling_logits, uniforms
from ..types import Response
from .gathered_weights import gathered_lm
from .stop_strings import StopStrings, split_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    from ...config.sections import Sampling
    from . import SamplingActor

LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that have a paged cache."""


def refusal(lm: "PreTrainedModel") -> str | None:
    """The reason why a causal LM cannot use continuous batching, in words; None when it can.

    peft may wrap the model.
    """
    lm = unwrapped(lm)
    config = lm.config.get_text_config(decoder=True)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - LAYERS)
    if other:
        return f"layers of the kind {other[0]}"
    if not hasattr(lm, "init_continuous_batching") or not lm._supports_attention_backend:
        return "attention of its own"
    if rotary.follows_length(config):
        return "rotary factors that follow the longest sequence of a batch"
    form = architecture_form(lm.base_model)
    return None if form.packs else form.why


class Continuous:
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
            UserError: The weights are sharded and not gathered, or the model cannot run in such batches.
        """
        self.actor, self.sampling = actor, sampling
        self.ends, marks = split_ends(ends)
        self.stop = StopStrings(tokenizer, [*sampling.stop, *marks])
        if actor.sharded and not sampling.gather:
            raise UserError(
                "sampling.engine: continuous needs the weights whole; expected sampling.gather=true or "
                "sampling.engine=generate under ZeRO-3"
            )
        why = refusal(actor.module.lm)
        if why:
            raise UserError(
                f"sampling.engine: continuous cannot run a {type(unwrapped(actor.module.lm)).__name__} "
                f"({why}); expected sampling.engine=generate"
            )

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]
    ) -> list[Response]:
        """See RolloutEngine."""
        responses = []
        with gathered_lm(self.actor) as wrapped, own_attention(unwrapped(wrapped)) as lm:
            size = self.sampling.batch_size or max(1, len(prompts))
            for start in range(0, len(prompts), size):
                rows = slice(start, start + size)
                responses += self._batch(lm, prompts[rows], seeds[rows], limits[rows])
        return responses

    def _batch(
        self,
        lm: "PreTrainedModel",
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        limits: Sequence[int],
    ) -> list[Response]:
        sampler = Sampler(self.sampling, prompts, seeds, limits, lm.device)
        # On a CPU transformers' own share of memory applies where the recipe gives none.
        memory = (
            self.sampling.memory_share("continuous") if lm.device.type == "cuda" else self.sampling.memory
        )
        sampled: dict[int, tuple[list[int], int | None]] = {}  # {slot: (ids, those up to a stop string)}
        with running(lm, sampler, prompts, limits, memory, self.ends) as manager:
            waiting: dict[str, int] = {}
            for slot, (prompt, limit) in enumerate(zip(prompts, limits)):
                name = manager.add_request(
                    prompt,
                    max_new_tokens=limit,
                    eos_token_id=self.ends or -1,
                    streaming=bool(self.stop),
                    slot=slot,
                )
                waiting[name] = slot
            while waiting:
                result = manager.get_result(timeout=1.0)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError(
                            "continuous batching ended before its requests"
                        ) from manager.background_thread_status.fatal_error
                    continue
                if result.error is not None:
                    raise RuntimeError(f"continuous batching: {result.error}")
                if result.request_id not in waiting:  # sent before it was cancelled
                    continue
                ids, done = result.generated_tokens, result.is_finished()
                count = self.stop.length(ids)
                if done or count is not None:
                    sampled[waiting.pop(result.request_id)] = ids, count
                if count is not None and not done:
                    manager.cancel_request(result.request_id)
        logp_ST = sampler.logp_ST.cpu()
        responses = []
        for slot in range(len(prompts)):
            ids, count = sampled[slot]
            ids = ids[:count]
            responses.append(
                Response(ids, logp_ST[slot, : len(ids)].tolist(), count is not None or ids[-1] in self.ends)
            )
        return responses

    def refresh(self) -> None:
        """Nothing to do: the trained weights are the ones that generate."""

    def close(self) -> None:
        """Nothing to do: cache and graphs end with `generate`."""


class Sampler(ContinuousBatchingLogitsProcessor):
    """Chooses tokens inside a step of continuous batching; reads and writes tables alone.

    The step may be a captured graph. It gets, for each row, the place of its sequence's step in the tables;
    rows that only fill a graph have a place in one more sequence at the end.
    """

    supported_kwargs = {"slot": int}
    ignored_kwargs = ()
    supports_continuous_batching = True

    def __init__(
        self,
        sampling: "Sampling",
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        limits: Sequence[int],
        device: torch.device,
    ) -> None:
        """Fills the tables.

        Args:
            sampling: The distribution.
            prompts: Ids of each sequence.
            seeds: Of each sequence.
            limits: Most steps of each sequence.
            device: Where the tables are.
        """
        self.sampling, self.starts = sampling, [len(prompt) for prompt in prompts]
        numbers_ST = uniforms(seeds, limits)
        # A finished sequence may run further steps until the host notices.
        self.numbers_ST = torch.nn.functional.pad(numbers_ST, (0, 4, 0, 1)).to(device)
        self.steps = self.numbers_ST.shape[1]
        self.nowhere = self.numbers_ST.numel() - 1
        self.logp_ST = torch.zeros(self.numbers_ST.shape, device=device)
        self.seen_SL: torch.Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            longest = max(self.starts)
            rows = [prompt + prompt[:1] * (longest - len(prompt) + self.steps) for prompt in prompts]
            self.seen_SL = torch.tensor([*rows, [0] * (longest + self.steps)], device=device)
            self.longest = longest

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Gives rows without a request the place outside all sequences."""
        int32_tensor.fill_(self.nowhere)

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Places in the tables, from the number of tokens of each sequence.

        They are right too for a sequence that had to start again. There are as many as a step can have rows:
        a row without a request would keep its place of the step before.
        """
        places = []
        for request in requests_with_new_token:
            slot = request.state.logit_processor_kwargs.get("slot")
            step = 0 if slot is None else request.state.position_offset - self.starts[slot]
            places.append(self.nowhere if slot is None else slot * self.steps + min(step, self.steps - 1))
        return torch.tensor(places + [self.nowhere] * (len(self.starts) - len(places)), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Chooses the tokens of a step; the scores [N, V] that it returns leave no other choice."""
        place_N = tensor_arg[: len(scores)].long()
        seen_NL = None if self.seen_SL is None else self.seen_SL[place_N // self.steps]
        ids_N, logp_N = pick(
            sampling_logits(scores, self.sampling, seen_NL), self.numbers_ST.view(-1)[place_N]
        )
        self.logp_ST.view(-1).scatter_(0, place_N, logp_N)
        if self.seen_SL is not None:
            seen_place_N = place_N // self.steps * self.seen_SL.shape[1] + self.longest + place_N % self.steps
            self.seen_SL.view(-1).scatter_(0, seen_place_N, ids_N)
        return scores.fill_(-math.inf).scatter_(1, ids_N[:, None], 0.0)


@contextlib.contextmanager
def running(
    lm: "PreTrainedModel",
    sampler: Sampler,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    memory: float | None,
    ends: list[int],
) -> "Iterator[ContinuousBatchingManager]":
    """Context with a running manager of continuous batching that chooses tokens by a Sampler.

    Args:
        lm: The model.
        sampler: Chooses the tokens.
        prompts: Ids of each sequence.
        limits: Most tokens of each response.
        memory: Most share of the device's memory for the cache; None: transformers' own.
        ends: Ids that end a response.

    Yields:
        The manager.

    Raises:
        UserError: There is no memory for a cache.
    """
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    manager = started(lm, sampler, settings(lm, prompts, limits, memory), ends)
    if manager is None:  # the cache does not fit: transformers chooses one that does
        config = settings(lm, prompts, limits, memory)
        config.num_blocks = None
        manager = started(lm, sampler, config, ends)
    if manager is None:
        raise UserError(
            "sampling.engine: continuous found no memory for its cache; expected more free memory, a larger "
            "sampling.memory or a smaller sampling.batch_size"
        )
    try:
        yield manager
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()


def started(
    lm: "PreTrainedModel", sampler: Sampler, config: ContinuousBatchingConfig, ends: list[int]
) -> "ContinuousBatchingManager | None":
    """A running manager, or None when its cache does not fit."""
    own = GenerationConfig(do_sample=False, eos_token_id=ends or -1, pad_token_id=0)
    manager = lm.init_continuous_batching(generation_config=own, continuous_batching_config=config)
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    processors.tensors_required = 1
    manager.logit_processor = processors
    try:
        # allocates the cache, and captures graphs where there are any
        manager.warmup()
    except (MemoryError, ValueError) as error:
        if isinstance(error, ValueError) and "num_sectors" not in str(error):
            raise
        return None
    manager.start()
    return manager


def settings(
    lm: "PreTrainedModel", prompts: Sequence[list[int]], limits: Sequence[int], memory: float | None
) -> ContinuousBatchingConfig:
    """A ContinuousBatchingConfig with a cache as large as these sequences can need.

    Args:
        lm: The model.
        prompts: Ids of each sequence.
        limits: Most tokens of each response.
        memory: Most share of the device's memory; None: transformers' own.

    Returns:
        The config.
    """
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    flash = any(importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn_interface"))
    cuda = lm.device.type == "cuda"
    # Without flash-attn transformers builds a mask of tokens by tokens of the cache: fewer at a time.
    tokens = min(8192 if flash and cuda else 1024, sum(map(len, prompts)))
    wanted = {
        "max_batch_tokens": max(tokens, len(prompts)),
        "max_requests_per_batch": len(prompts),
        "max_memory_percent": memory,
        "auto_switch_to_flash": flash and cuda,  # else transformers may look for a kernel on the Hub
    }
    config = ContinuousBatchingConfig(**{key: value for key, value in wanted.items() if key in known})
    page = getattr(config, "page_size", None) or config.block_size
    config.num_blocks = (
        sum(math.ceil((len(prompt) + limit + 2) / page) for prompt, limit in zip(prompts, limits)) + 1
    )
    return config


@contextlib.contextmanager
def own_attention(lm: "PreTrainedModel") -> "Iterator[PreTrainedModel]":
    """Context with a model that has its own attention: ours for packed sequences has no paged cache."""
    packed_form = lm.config._attn_implementation
    attention.uninstall(lm)
    try:
        yield lm
    finally:
        if lm.config._attn_implementation != packed_form:
            lm.set_attn_implementation(packed_form)
