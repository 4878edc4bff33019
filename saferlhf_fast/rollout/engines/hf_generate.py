"""Responses through transformers' `generate`, on any device and for any causal LM.

Which token comes next is decided here, from one number per sequence and step that the sequence's seed gives;
`generate` is handed scores that leave no choice. It cannot drop rows of a batch, so it is stopped whenever a
quarter of them have ended, and called again with the cache of the others: a batch costs about what its tokens
cost, not rows times the longest.

Leaves out: beams, and weights of its own (those of the trained model are used).
Shapes: B rows of a call, P prompt columns (left-padded), K steps of a call, V vocabulary.
"""

import contextlib
import inspect
import math

import torch

from ...data.batches import collate_left
from ...models.lora import plain as unwrapped
from ...models.sampling_distribution import pick, sampling_logits, uniforms
from ...runtime import engine
from ..types import Response
from .gathered_weights import whole
from .stop_strings import StopStrings

LIVE_SHARE = 0.75
"""A call of `generate` ends when no more than this share of its rows is still going."""


class Generate:
    """A rollout engine (see saferlhf_fast.rollout.engines)."""

    def __init__(self, actor, tokenizer, ends, sampling):
        self.actor, self.tokenizer, self.ends, self.sampling = actor, tokenizer, ends, sampling
        self.stop = StopStrings(tokenizer, sampling.stop)

    @torch.no_grad()
    def generate(self, prompts, seeds, limits):
        # Without gathered weights every token's forward pass is a collective: ranks that have ended go on
        # until the last one has, so all must make the same number of calls.
        together = self.actor.sharded and not self.sampling.gather and engine.world_size() > 1
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # little padding
        size = self.sampling.batch_size or max(1, len(prompts))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if together:
            most = max(engine.gather_objects(len(batches)))
            batches += [[]] * (most - len(batches))
        made = {}
        with whole(self.actor, self.sampling.gather) as lm, without_own_settings(unwrapped(lm)):
            for batch in batches:
                rows = [Row(prompts[i], seeds[i], limits[i]) for i in batch] or [
                    Row(self.ends[:1] or [0], 0, 1)
                ]
                self._batch(unwrapped(lm), rows, together)
                made.update(zip(batch, rows))
        return [made[i].response() for i in range(len(prompts))]

    def _batch(self, lm, rows, together):
        """Fills rows (longest prompt first) with their responses."""
        ids_BL, mask_BL = collate_left([row.prompt for row in rows], self.tokenizer.pad_token_id or 0)
        device = engine.device() if self.actor.sharded else lm.device
        ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device).long()
        numbers_BT = uniforms([row.seed for row in rows], [row.limit for row in rows]).to(device)
        cache = None if together else selectable_cache(lm)
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
            live = call.give()
            if not live:
                return
            step = call.step
            live_B = torch.tensor(live, device=ids_BL.device)
            rows, ids_BL, numbers_BT = [rows[i] for i in live], ids_BL[live_B], numbers_BT[live_B]
            mask_BL = torch.cat(
                [mask_BL, mask_BL.new_ones(len(mask_BL), ids_BL.shape[1] - mask_BL.shape[1])], 1
            )[live_B]
            cache.reorder_cache(live_B)

    def refresh(self):
        """Nothing to do: the trained weights are the ones that generate."""

    def close(self):
        """Nothing to do."""


class Row:
    """One sequence while it is sampled."""

    def __init__(self, prompt, seed, limit):
        self.prompt, self.seed, self.limit = prompt, seed, limit
        self.ids, self.logp, self.ended = [], [], False

    def response(self):
        return Response(self.ids, self.logp, self.ended)


class Call:
    """One call of `generate` for some rows from a step on: chooses their tokens, keeps them, says when to
    stop.

    It is the call's logits processor; `ended` is its stopping criterion.
    """

    def __init__(self, generator, rows, numbers_BT, step, share):
        self.rows, self.numbers_BT, self.step, self.share = rows, numbers_BT, step, share
        self.sampling, self.stop = generator.sampling, generator.stop
        device = numbers_BT.device
        self.ends = torch.tensor(generator.ends, dtype=torch.long, device=device)
        self.limit_B = torch.tensor([row.limit for row in rows], device=device)
        self.over_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
        # of the rows' ids without padding
        self.first_B = torch.tensor([len(row.prompt) for row in rows])
        self.ids, self.logp, self.stopped, self.over = [], [], [], []

    def __call__(self, input_ids, scores):
        seen_BL = None
        if self.sampling.repetition_penalty != 1.0:
            known = (self.first_B + self.step).to(input_ids.device)[:, None]
            at = torch.arange(input_ids.shape[1], 0, -1, device=input_ids.device)
            # padding on the left is nobody's token
            seen_BL = torch.where(at <= known, input_ids, input_ids[:, -1:])
        ids_B, logp_B = pick(sampling_logits(scores, self.sampling, seen_BL), self.numbers_BT[:, self.step])
        self.step += 1
        self.ids.append(ids_B)
        self.logp.append(logp_B)
        return scores.fill_(-math.inf).scatter_(1, ids_B[:, None], 0.0)

    def ended(self, input_ids, scores):
        """Which rows have ended; all of them when too few go on for the call to be worth it."""
        stopped_B = torch.isin(self.ids[-1], self.ends)
        if self.stop:
            stopped_B |= self._completed().to(stopped_B.device)
        self.over_B = self.over_B | stopped_B | (self.limit_B <= self.step)
        self.stopped.append(stopped_B)
        self.over.append(self.over_B)
        return self.over_B | ((~self.over_B).sum() <= int(self.share * len(self.rows)))

    def _completed(self):
        """[B]: the response so far ends with a stop string."""
        new = torch.stack(self.ids[-self.stop.window :], 1).tolist()
        return torch.tensor(
            [self.stop.completed([*row.ids[-self.stop.window :], *ids]) for row, ids in zip(self.rows, new)]
        )

    def give(self):
        """Hands rows what was sampled for them -> indices of those that go on."""
        ids, logp, over, stopped = (
            torch.stack(part, 1).tolist() for part in (self.ids, self.logp, self.over, self.stopped)
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


def selectable_cache(lm):
    """A cache from which rows can be taken out, or None for models that have none of that kind."""
    from transformers import DynamicCache

    takes = "past_key_values" in inspect.signature(lm.forward).parameters
    if not takes or not lm._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=lm.config.get_text_config(decoder=True))


@contextlib.contextmanager
def without_own_settings(lm):
    """Context in which `generate` knows nothing of the model's generation_config.

    Published chat models bring a repetition penalty, min_p, beams …: what is sampled would then come from
    another distribution than the one that is scored and trained.
    """
    from transformers import GenerationConfig

    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
