"""Footprints of the passes of a stage: each model's, over the worst batch that a recipe allows.

The worst batch fills a pass with sequences of the greatest length. Deep models are run with a few layers and
twice as many, and the rest is a straight line: layers of a model are alike, or alike in a short cycle.
"""

import functools
import json

import torch

from . import sizes
from .trace import Footprint, Tracker, footprint_of, standing_in_for

# layers: kinds of layers (full and sliding attention, say) come in cycles of 1, 2, 3 or 6
CYCLE = 6
DEEP = 3 * CYCLE  # layers from which on it pays


def lengths_of(tokens, longest):
    """Lengths of the sequences of a pass: as long as may be; one that is longer than the budget has a pass of
    its own.
    """
    whole, rest = divmod(max(tokens, longest), longest)
    return (longest,) * whole + ((rest,) if rest else ())


def predicted_rows(asked, length):
    """Positions whose hidden state is asked for. asked: "end", "all", or how many tokens at the end are
    predicted.
    """
    if asked == "end":
        return range(length - 1, length)
    if asked == "all":
        return range(length)
    return range(max(0, length - 1 - asked), length - 1)


@functools.lru_cache(maxsize=256)
def of_pass(blueprint, lengths, asked, device, train=True, keep_gradients=False, objective=False, shape=()):
    """-> Footprint of a packed pass. objective: the head makes the policy loss itself (`linear_ppo_loss`) ·
    shape: top-p, top-k and penalty of the distribution that is scored, () for none.
    """

    def measure(blueprint):
        from ...config.stages import Sampling
        from ...models.packing import pack_sequences
        from ...models.policy import Objective

        meta = torch.device("meta")
        packed = pack_sequences([[0] * n for n in lengths], [predicted_rows(asked, n) for n in lengths], meta)

        def call(module):
            if blueprint.kind == "score":
                return module(packed)
            sampling = Sampling(**dict(zip(("top_p", "top_k", "repetition_penalty"), shape)))
            if not objective:
                return module(packed, sampling)
            known_N = torch.empty(sum(packed.counts), device=meta)
            return module(
                packed, sampling, Objective(known_N, known_N, {"clip_ratio": 0.2, "normalizer": 1})
            )[0]

        return footprint_of(sizes.build(blueprint), call, device, train=train, keep_gradients=keep_gradients)

    return _by_layers(measure, blueprint)


@functools.lru_cache(maxsize=64)
def of_generation(blueprint, sequences, prompt, tokens, device):
    """-> (Footprint of the pass over prompts, of the last step of sequences of `tokens`).

    The cache is in both.

    Rows are padded on the left, so there is a mask, which keeps attention from taking shared keys and values
    as they are.
    """

    def measure(length, step, blueprint):
        module = sizes.build(blueprint).lm
        module.train(False)
        ids = torch.zeros(sequences, length, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with Tracker(device) as tracker, standing_in_for(device), torch.no_grad():
            tracker.know([*module.parameters(), *module.buffers(), *inputs.values()])
            out = module(**inputs, use_cache=True, logits_to_keep=1)
            if step:
                cache = out.past_key_values
                del out
                tracker.since()
                mask = torch.ones(sequences, length + 1, dtype=torch.long, device="meta")
                module(
                    input_ids=ids[:, :1],
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        return Footprint(0, tracker.peak, 0, 0)

    plain = blueprint._replace(checkpointing=False, lora=())
    return tuple(
        _by_layers(functools.partial(measure, length, step), plain)
        for length, step in ((prompt, False), (max(1, tokens - 1), True))
    )


def _by_layers(measure, blueprint):
    """measure(blueprint), by two runs of fewer layers where there are many."""
    depth = json.loads(blueprint.config).get("num_hidden_layers")
    with sizes.without_data(blueprint):
        if not isinstance(depth, int) or depth <= DEEP or blueprint.remote:
            return measure(blueprint)
        few, more = (measure(with_layers(blueprint, n)) for n in (CYCLE, 2 * CYCLE))
    return Footprint(*(b + (b - a) * (depth - 2 * CYCLE) // CYCLE for a, b in zip(few, more)))


def with_layers(blueprint, layers):
    """The same model with its first few layers."""
    values = json.loads(blueprint.config)
    depth = values["num_hidden_layers"]
    for key, value in values.items():
        if isinstance(value, list) and len(value) == depth:
            values[key] = value[:layers]
    return blueprint._replace(config=json.dumps({**values, "num_hidden_layers": layers}, sort_keys=True))
