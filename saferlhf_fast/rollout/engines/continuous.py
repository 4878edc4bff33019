"""Responses through transformers' continuous batching: a paged cache, sequences that come and go, CUDA graphs
on a GPU.

It samples with one generator for the batch and applies no repetition penalty. Here a logits processor of ours
chooses the tokens, as in hf_generate.py: numbers of each sequence lie in a table on the device, log-probs and
tokens are written to others, so that a captured graph can be replayed. The trained weights are used where
they are; cache and graphs live for one `generate`, since the update needs their memory. Without flash-attn
transformers goes through SDPA with a dense mask over all sequences of a step, and captures no graphs: slower
by far, and so on a CPU, where it serves to be tested.

Leaves out: weights sharded by ZeRO-3 while generating (they are gathered), architectures whose attention is
not transformers' own. Shapes: N rows of a step, S sequences, T steps a sequence may have, V vocabulary.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import math

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from ...errors import UserError
from ...models import attention
from ...models.lora import plain as unwrapped
from ...models.sampling_distribution import pick, sampling_logits, uniforms
from ..types import Response
from .gathered_weights import whole
from .stop_strings import StopStrings

LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that have a paged cache."""


def refusal(lm):
    """Why a causal LM (maybe inside peft) cannot be generated from by continuous batching, in words; None
    when it can.
    """
    lm = unwrapped(lm)
    config = lm.config.get_text_config(decoder=True)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - LAYERS)
    if other:
        return f"layers of the kind {other[0]}"
    if not hasattr(lm, "init_continuous_batching") or not lm._supports_attention_backend:
        return "attention of its own"
    return None


class Continuous:
    """A rollout engine (see saferlhf_fast.rollout.engines)."""

    def __init__(self, actor, tokenizer, ends, sampling):
        self.actor, self.ends, self.sampling = actor, list(ends), sampling
        self.stop = StopStrings(tokenizer, sampling.stop)
        if actor.sharded and not sampling.gather:
            raise UserError(
                "sampling.engine: continuous needs the weights whole; expected sampling.gather=true or "
                "sampling.engine=generate under ZeRO-3"
            )
        why = refusal(actor.module.lm)
        if why:
            raise UserError(
                f"sampling.engine: continuous cannot run a {type(unwrapped(actor.module.lm)).__name__} "
                f"({why}); "
                "expected sampling.engine=generate"
            )

    @torch.no_grad()
    def generate(self, prompts, seeds, limits):
        made = []
        with whole(self.actor) as wrapped, own_attention(unwrapped(wrapped)) as lm:
            size = self.sampling.batch_size or max(1, len(prompts))
            for start in range(0, len(prompts), size):
                rows = slice(start, start + size)
                made += self._batch(lm, prompts[rows], seeds[rows], limits[rows])
        return made

    def _batch(self, lm, prompts, seeds, limits):
        sampler = Sampler(self.sampling, prompts, seeds, limits, lm.device)
        # On a CPU transformers' own share holds where the recipe gives none.
        memory = (
            self.sampling.memory_share("continuous") if lm.device.type == "cuda" else self.sampling.memory
        )
        found = {}
        with running(lm, sampler, prompts, limits, memory, self.ends) as manager:
            waiting = {}
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
                if result.request_id not in waiting:  # said before it heard of being cancelled
                    continue
                ids, done = result.generated_tokens, result.is_finished()
                count = self.stop.length(ids)
                if done or count is not None:
                    found[waiting.pop(result.request_id)] = ids, count
                if count is not None and not done:
                    manager.cancel_request(result.request_id)
        logp_ST = sampler.logp_ST.cpu()
        made = []
        for slot in range(len(prompts)):
            ids, count = found[slot]
            ids = ids[:count]
            made.append(
                Response(ids, logp_ST[slot, : len(ids)].tolist(), count is not None or ids[-1] in self.ends)
            )
        return made

    def refresh(self):
        """Nothing to do: the trained weights are the ones that generate."""

    def close(self):
        """Nothing to do: nothing outlives `generate`."""


class Sampler(ContinuousBatchingLogitsProcessor):
    """Chooses tokens inside a step of continuous batching, which may be a captured graph: reads and writes
    tables alone.

    Of each row it is told where in the tables its sequence's step lies; rows that only fill up a graph lie in
    a sequence more, at the end.
    """

    supported_kwargs = {"slot": int}
    ignored_kwargs = ()
    supports_continuous_batching = True

    def __init__(self, sampling, prompts, seeds, limits, device):
        self.sampling, self.starts = sampling, [len(prompt) for prompt in prompts]
        numbers_ST = uniforms(seeds, limits)
        # A finished sequence may make steps more while the host learns of it.
        self.numbers_ST = torch.nn.functional.pad(numbers_ST, (0, 4, 0, 1)).to(device)
        self.steps = self.numbers_ST.shape[1]
        self.nowhere = self.numbers_ST.numel() - 1
        self.logp_ST = torch.zeros(self.numbers_ST.shape, device=device)
        self.seen_SL = None
        if sampling.repetition_penalty != 1.0:
            longest = max(self.starts)
            rows = [prompt + prompt[:1] * (longest - len(prompt) + self.steps) for prompt in prompts]
            self.seen_SL = torch.tensor([*rows, [0] * (longest + self.steps)], device=device)
            self.longest = longest

    def fill_defaults(self, int32_tensor):
        int32_tensor.fill_(self.nowhere)

    def prepare_tensor_args(self, requests_with_new_token):
        """Places in the tables, told from how many tokens a sequence has: also right for one that had to
        start again.

        As many as a step can have rows: those that are not asked for would keep the places of the step
        before.
        """
        at = []
        for request in requests_with_new_token:
            slot = request.state.logit_processor_kwargs.get("slot")
            step = 0 if slot is None else request.state.position_offset - self.starts[slot]
            at.append(self.nowhere if slot is None else slot * self.steps + min(step, self.steps - 1))
        return torch.tensor(at + [self.nowhere] * (len(self.starts) - len(at)), dtype=torch.int32)

    def __call__(self, scores, tensor_arg):
        at_N = tensor_arg[: len(scores)].long()
        seen_NL = None if self.seen_SL is None else self.seen_SL[at_N // self.steps]
        ids_N, logp_N = pick(sampling_logits(scores, self.sampling, seen_NL), self.numbers_ST.view(-1)[at_N])
        self.logp_ST.view(-1).scatter_(0, at_N, logp_N)
        if self.seen_SL is not None:
            place_N = at_N // self.steps * self.seen_SL.shape[1] + self.longest + at_N % self.steps
            self.seen_SL.view(-1).scatter_(0, place_N, ids_N)
        return scores.fill_(-math.inf).scatter_(1, ids_N[:, None], 0.0)


@contextlib.contextmanager
def running(lm, sampler, prompts, limits, memory, ends):
    """Context with a manager of continuous batching at work, that chooses tokens by a Sampler."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    manager = started(lm, sampler, settings(lm, prompts, limits, memory), ends)
    if manager is None:  # it does not fit at once: as much as there is room for
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


def started(lm, sampler, config, ends):
    """A running manager, or None when its cache does not fit."""
    own = GenerationConfig(do_sample=False, eos_token_id=ends or -1, pad_token_id=0)
    manager = lm.init_continuous_batching(generation_config=own, continuous_batching_config=config)
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    processors.tensors_required = 1
    manager.logit_processor = processors
    try:
        # makes the cache, and captures graphs where there are any
        manager.warmup()
    except (MemoryError, ValueError) as error:
        if isinstance(error, ValueError) and "num_sectors" not in str(error):
            raise
        return None
    manager.start()
    return manager


def settings(lm, prompts, limits, memory):
    """A ContinuousBatchingConfig with a cache as large as these sequences can need."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    flash = any(importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn_interface"))
    cuda = lm.device.type == "cuda"
    # Without flash-attn a mask of tokens by tokens of the cache is made: fewer at a time.
    tokens = min(8192 if flash and cuda else 1024, sum(map(len, prompts)))
    wanted = {
        "max_batch_tokens": max(tokens, len(prompts)),
        "max_requests_per_batch": len(prompts),
        "max_memory_percent": memory,
        "auto_switch_to_flash": flash and cuda,
    }  # else transformers may look for a kernel on the Hub
    config = ContinuousBatchingConfig(**{key: value for key, value in wanted.items() if key in known})
    page = getattr(config, "page_size", None) or config.block_size
    config.num_blocks = (
        sum(math.ceil((len(prompt) + limit + 2) / page) for prompt, limit in zip(prompts, limits)) + 1
    )
    return config


@contextlib.contextmanager
def own_attention(lm):
    """Context with a model that has its own attention instead of ours for packed sequences, which knows no
    paged cache.
    """
    ours = lm.config._attn_implementation
    attention.uninstall(lm)
    try:
        yield lm
    finally:
        if lm.config._attn_implementation != ours:
            lm.set_attn_implementation(ours)
