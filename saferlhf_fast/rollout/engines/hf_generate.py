"""Responses through transformers' `generate`, on any device and for any causal LM.

The next token is decided here, from one number per sequence and step that the sequence's seed gives;
`generate` gets scores that leave no choice. It cannot drop rows of a batch, so it is stopped whenever a
quarter of them have ended, and called again with the cache of the others: the cost of a batch is about that
of its tokens, not rows times the longest.

Leaves out: beams, and weights of its own (those of the trained model are used).
Shapes: legend in rollout/types.py; rows are padded on the left.
"""

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...data.batches import collate_left
from ...models.lora import plain as unwrapped
from ...models.sampling_distribution import pick, sampling_logits, uniforms
from ...runtime import console, engine
from ..types import Response
from .gathered_weights import gathered_lm
from .row_lengths import Batching, batching_of
from .stop_strings import StopStrings, split_ends

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

    from ...config.sections import Sampling
    from . import SamplingActor

LIVE_SHARE = 0.75
"""A call of `generate` ends when no more than this share of its rows has not ended."""


class Generate:
    """A rollout engine (see saferlhf_fast.rollout.engines)."""

    def __init__(
        self,
        actor: "SamplingActor",
        tokenizer: "PreTrainedTokenizerBase",
        ends: Sequence[int | str],
        sampling: "Sampling",
        batching: Batching | None = None,
    ) -> None:
        """Takes what the engine samples with.

        Args:
            actor: The policy that samples.
            tokenizer: Its tokenizer.
            ends: Ids that end a response, and end marks of several tokens.
            sampling: The distribution and its limits.
            batching: Which rows are sampled together; None: a probe decides, and a line tells what is done
                where not every batch would be right.
        """
        if batching is None:
            lm = unwrapped(actor.module.lm)
            batching = batching_of(lm)
            if batching.in_words():
                console.say(f"rollout: {type(lm).__name__}: {batching.in_words()}")
        self.batching = batching
        self.actor, self.tokenizer, self.sampling = actor, tokenizer, sampling
        self.ends, marks = split_ends(ends)
        self.stop = StopStrings(tokenizer, [*sampling.stop, *marks])

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]
    ) -> list[Response]:
        """See RolloutEngine."""
        # Without gathered weights every token's forward pass is a collective: ranks that have ended continue
        # until the last one has, so all must run the same number of calls.
        together = self.actor.sharded and not self.sampling.gather and engine.world_size() > 1
        batches = self._batches(prompts)
        if together:
            most = max(engine.gather_objects(len(batches)))
            batches += [[]] * (most - len(batches))
        done: dict[int, Row] = {}
        with gathered_lm(self.actor, self.sampling.gather) as lm, without_own_settings(unwrapped(lm)):
            for batch in batches:
                rows = [Row(prompts[i], seeds[i], limits[i]) for i in batch]
                rows = rows or [Row([*self.ends[:1]] or [0], 0, 1)]
                self._batch(unwrapped(lm), rows, together)
                done.update(zip(batch, rows))
        return [done[i].response() for i in range(len(prompts))]

    def _batches(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Indices of the prompts that are sampled together, the longest first: there is little padding."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        size = 1 if self.batching.rows == "single" else self.sampling.batch_size or max(1, len(prompts))
        alike = [order]
        if self.batching.rows == "equal":
            alike = [list(same) for _, same in itertools.groupby(order, lambda i: len(prompts[i]))]
        return [part[start : start + size] for part in alike for start in range(0, len(part), size)]

    def _batch(self, lm: "PreTrainedModel", rows: "list[Row]", together: bool) -> None:
        """Samples the responses of rows, which come with the longest prompt first."""
        ids_BL, mask_BL = collate_left([row.prompt for row in rows], self.tokenizer.pad_token_id or 0)
        device = engine.device() if self.actor.sharded else lm.device
        ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device).long()
        numbers_BT = uniforms([row.seed for row in rows], [row.limit for row in rows]).to(device)
        cache = selectable_cache(lm) if self.batching.drops and not together else None
        share = LIVE_SHARE if cache is not None else 0.0
        step = 0
        while rows:
            call = Call(self, rows, numbers_BT, step, share)
            inputs = {} if cache is None else {"past_key_values": cache}
            ids_BL = lm.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                do_sample=False,
                use_cache=True,
                max_new_tokens=max(row.limit for row in rows) - step,
                synced_gpus=together,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                logits_processor=[call],
                stopping_criteria=[call.ended],
                **inputs,
            )
            live = call.finish()
            if not live:
                return
            assert cache is not None, "without a cache a call ends when all of its rows have ended"
            step = call.step
            live_B = torch.tensor(live, device=ids_BL.device)
            rows, ids_BL, numbers_BT = [rows[i] for i in live], ids_BL[live_B], numbers_BT[live_B]
            mask_BL = torch.cat(
                [mask_BL, mask_BL.new_ones(len(mask_BL), ids_BL.shape[1] - mask_BL.shape[1])], 1
            )[live_B]
            cache.reorder_cache(live_B)

    def refresh(self) -> None:
        """Nothing to do: the trained weights are the ones that generate."""

    def close(self) -> None:
        """Nothing to do."""


class Row:
    """One sequence while it is sampled."""

    def __init__(self, prompt: list[int], seed: int, limit: int) -> None:
        self.prompt, self.seed, self.limit = prompt, seed, limit
        self.ids: list[int] = []
        self.logp: list[float] = []
        self.ended = False

    def response(self) -> Response:
        """What was sampled so far."""
        return Response(self.ids, self.logp, self.ended)


class Call:
    """One call of `generate` for some rows from a step on: chooses their tokens, and decides when to stop.

    It is the call's logits processor; `ended` is its stopping criterion.
    """

    def __init__(
        self, generator: Generate, rows: Sequence[Row], numbers_BT: torch.Tensor, step: int, share: float
    ) -> None:
        """Starts a call.

        Args:
            generator: Its engine.
            rows: What it samples for.
            numbers_BT: Numbers in [0, 1) that decide the tokens, of all steps.
            step: The first step.
            share: The call ends when no more than this share of its rows has not ended.
        """
        self.rows, self.numbers_BT, self.step, self.share = rows, numbers_BT, step, share
        self.sampling, self.stop = generator.sampling, generator.stop
        device = numbers_BT.device
        self.ends = torch.tensor(generator.ends, dtype=torch.long, device=device)
        self.limit_B = torch.tensor([row.limit for row in rows], device=device)
        self.over_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
        # prompt tokens, without padding
        self.first_B = torch.tensor([len(row.prompt) for row in rows])
        # [B] of each step
        self.ids: list[torch.Tensor] = []
        self.logp: list[torch.Tensor] = []
        self.stopped: list[torch.Tensor] = []
        self.over: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Chooses the tokens of a step; the scores [B, V] that it returns leave no other choice."""
        seen_BL = None
        if self.sampling.repetition_penalty != 1.0:
            known = (self.first_B + self.step).to(input_ids.device)[:, None]
            from_end_L = torch.arange(input_ids.shape[1], 0, -1, device=input_ids.device)
            # padding on the left was not seen
            seen_BL = torch.where(from_end_L <= known, input_ids, input_ids[:, -1:])
        ids_B, logp_B = pick(sampling_logits(scores, self.sampling, seen_BL), self.numbers_BT[:, self.step])
        self.step += 1
        self.ids.append(ids_B)
        self.logp.append(logp_B)
        return scores.fill_(-math.inf).scatter_(1, ids_B[:, None], 0.0)

    def ended(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        """[B]: which rows have ended; all of them when too few are left for the call to be worth it."""
        stopped_B = torch.isin(self.ids[-1], self.ends)
        if self.stop:
            stopped_B |= self._completed().to(stopped_B.device)
        self.over_B = self.over_B | stopped_B | (self.limit_B <= self.step)
        self.stopped.append(stopped_B)
        self.over.append(self.over_B)
        return self.over_B | ((~self.over_B).sum() <= int(self.share * len(self.rows)))

    def _completed(self) -> torch.Tensor:
        """[B]: the response so far ends with a stop string."""
        new = torch.stack(self.ids[-self.stop.window :], 1).tolist()
        return torch.tensor(
            [self.stop.completed([*row.ids[-self.stop.window :], *ids]) for row, ids in zip(self.rows, new)]
        )

    def finish(self) -> list[int]:
        """Adds to each row what was sampled for it, and returns the indices of rows that have not ended."""
        ids, logp, over, stopped = (
            torch.stack(steps, 1).tolist() for steps in (self.ids, self.logp, self.over, self.stopped)
        )
        live = []
        for i, row in enumerate(self.rows):
            count = over[i].index(True) + 1 if over[i][-1] else len(over[i])
            row.ids += ids[i][:count]
            row.logp += logp[i][:count]
            row.ended = stopped[i][count - 1]
            if not over[i][-1]:
                live.append(i)
        return live


def selectable_cache(lm: "PreTrainedModel") -> "DynamicCache | None":
    """A cache from which rows can be removed, or None for models that have none of that kind."""
    from transformers import DynamicCache

    accepts = "past_key_values" in inspect.signature(lm.forward).parameters
    if not accepts or not lm._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=lm.config.get_text_config(decoder=True))


@contextlib.contextmanager
def without_own_settings(lm: "PreTrainedModel") -> Iterator[None]:
    """Context in which `generate` ignores the model's generation_config.

    Published chat models have a repetition penalty, min_p, beams … there: samples would then come from
    another distribution than the one that is scored and trained.
    """
    from transformers import GenerationConfig

    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
