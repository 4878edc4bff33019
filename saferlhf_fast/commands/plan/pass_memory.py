"""Footprints of the passes of a stage: each model's, over the largest batch that a recipe allows.

The largest batch fills a pass with sequences of the greatest length. A deep model is run with a few layers
and with twice as many, and its footprint is extrapolated along a straight line: layers of a model are alike,
or alike in a short cycle.
"""

import functools
import json
from collections.abc import Callable

import torch

from . import sizes
from .trace import Footprint, Tracker, attention_as_on, footprint_of

# layers: kinds of layers (full and sliding attention, say) repeat in cycles of 1, 2, 3 or 6
CYCLE = 6
DEEP = 3 * CYCLE  # number of layers from which on extrapolation saves time

Shape = tuple[()] | tuple[float, int, float]
"""Top-p, top-k and penalty of the sampling distribution that is scored; () when none of them changes it."""


def lengths_of(tokens: int, longest: int) -> tuple[int, ...]:
    """Returns the lengths of the sequences of the largest pass.

    A sequence that is longer than the pass may be has a pass of its own.

    Args:
        tokens: Most tokens of a pass.
        longest: Most tokens of a sequence.
    """
    full, remainder = divmod(max(tokens, longest), longest)
    return (longest,) * full + ((remainder,) if remainder else ())


def predicted_rows(predicted: int | str, length: int) -> range:
    """Returns the positions of a sequence whose hidden state the head reads.

    Args:
        predicted: "end" for the last position, "all" for every position, or how many tokens at the end are
            predicted.
        length: Tokens of the sequence.
    """
    if predicted == "end":
        return range(length - 1, length)
    if predicted == "all":
        return range(length)
    assert isinstance(predicted, int), f"expected end, all or a number of tokens, got {predicted}"
    return range(max(0, length - 1 - predicted), length - 1)


@functools.lru_cache(maxsize=256)
def footprint_of_pass(
    blueprint: sizes.Blueprint,
    lengths: tuple[int, ...],
    predicted: int | str,
    device: str,
    train: bool = True,
    keep_gradients: bool = False,
    objective: bool = False,
    shape: Shape = (),
) -> Footprint:
    """Measures a packed pass of a model.

    Args:
        blueprint: The model.
        lengths: Tokens of each sequence.
        predicted: Which positions the head reads, as in `predicted_rows`.
        device: "cuda" or "cpu": what is planned for.
        train: Whether there is a backward pass.
        keep_gradients: As in `footprint_of`.
        objective: Whether the head computes the policy loss itself (`linear_ppo_loss`).
        shape: The sampling distribution that is scored.
    """

    def measure(blueprint: sizes.Blueprint) -> Footprint:
        from ...config.stages import Sampling
        from ...models.packing import pack_sequences
        from ...models.policy import Objective

        meta = torch.device("meta")
        packed = pack_sequences(
            [[0] * n for n in lengths], [predicted_rows(predicted, n) for n in lengths], meta
        )

        def call(module: torch.nn.Module) -> torch.Tensor:
            if blueprint.kind == "score":
                return module(packed)
            sampling = Sampling()
            if shape:
                sampling = Sampling(top_p=shape[0], top_k=shape[1], repetition_penalty=shape[2])
            if not objective:
                return module(packed, sampling)
            known_N = torch.empty(sum(packed.counts), device=meta)
            return module(
                packed, sampling, Objective(known_N, known_N, {"clip_ratio": 0.2, "normalizer": 1})
            )[0]

        return footprint_of(sizes.build(blueprint), call, device, train=train, keep_gradients=keep_gradients)

    return _by_layers(measure, blueprint)


@functools.lru_cache(maxsize=64)
def footprints_of_generation(
    blueprint: sizes.Blueprint, sequences: int, prompt: int, tokens: int, device: str
) -> tuple[Footprint, Footprint]:
    """Measures generation: the pass over the prompts, and the last step, when sequences are complete.

    The cache is counted in both. Rows are padded on the left, so that there is a mask, which keeps attention
    from reading shared keys and values without a copy.

    Args:
        blueprint: The model; its adapters and checkpointing are ignored.
        sequences: Rows that are generated at once.
        prompt: Tokens of each prompt.
        tokens: Tokens of each complete sequence.
        device: "cuda" or "cpu": what is planned for.
    """

    def measure(length: int, step: bool, blueprint: sizes.Blueprint) -> Footprint:
        module = sizes.build(blueprint).lm
        module.train(False)
        ids = torch.zeros(sequences, length, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with Tracker(device) as tracker, attention_as_on(device), torch.no_grad():
            tracker.exclude([*module.parameters(), *module.buffers(), *inputs.values()])
            out = module(**inputs, use_cache=True, logits_to_keep=1)
            if step:
                cache = out.past_key_values
                del out
                tracker.restart_peak()
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
    return (
        _by_layers(functools.partial(measure, prompt, False), plain),
        _by_layers(functools.partial(measure, max(1, tokens - 1), True), plain),
    )


def _by_layers(measure: Callable[[sizes.Blueprint], Footprint], blueprint: sizes.Blueprint) -> Footprint:
    """Measures a model, by two runs of fewer layers where it has many."""
    depth = json.loads(blueprint.config).get("num_hidden_layers")
    with sizes.without_data(blueprint):
        if not isinstance(depth, int) or depth <= DEEP or blueprint.remote:
            return measure(blueprint)
        few, more = (measure(with_layers(blueprint, n)) for n in (CYCLE, 2 * CYCLE))
    return Footprint(*(b + (b - a) * (depth - 2 * CYCLE) // CYCLE for a, b in zip(few, more)))


def with_layers(blueprint: sizes.Blueprint, layers: int) -> sizes.Blueprint:
    """Returns the same model with only its first `layers` layers."""
    values = json.loads(blueprint.config)
    depth = values["num_hidden_layers"]
    for key, value in values.items():
        if isinstance(value, list) and len(value) == depth:
            values[key] = value[:layers]
    return blueprint._replace(config=json.dumps({**values, "num_hidden_layers": layers}, sort_keys=True))
