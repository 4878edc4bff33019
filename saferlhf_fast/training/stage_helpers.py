"""What the stages share around their loops: refusals, held-out examples, saving a policy."""

import contextlib

from ..data.batches import split_by_prompt
from ..models.causal_lm import save_causal_lm
from ..models.folders import refuse_short_context
from ..models.lora import has_lora
from ..runtime import engine


def refuse_long(cfg, config, longest):
    """UserError when the longest example (tokens) goes beyond the model's context."""
    refuse_short_context(cfg.model, config, longest, "train.max_length: the longest example")


def held_out_split(cfg, examples, load):
    """-> (training, evaluation) examples: own evaluation data, or a split by prompt."""
    if cfg.train.eval_data is not None:
        return examples, load(cfg.train.eval_data)[0]
    if not cfg.train.eval_fraction:
        return examples, []
    return split_by_prompt(examples, cfg.train.eval_fraction, cfg.seed)


def save_policy(policy, folder, tokenizer, card):
    """Writes the causal LM of an engine (LoRA merged, for which it is gathered whole) to a folder; every rank
    must call it.
    """
    lm = policy.module.lm
    state = policy.state_dict() if policy.sharded and not has_lora(lm) else None
    with policy.gathered() if has_lora(lm) else contextlib.nullcontext():
        if engine.rank() == 0:
            state = state and {name.removeprefix("lm."): tensor for name, tensor in state.items()}
            save_causal_lm(folder, lm, tokenizer, state, card)
    engine.barrier()
