"""Causal language models of any Hugging Face architecture: loaded, trained in every row, saved.

    lm = load_causal_lm(folder)
    save_causal_lm(folder, lm, tokenizer)

Dropout is left as the config has it; the PPO stages switch it off (`without_dropout`).
"""

import copy

import torch
from torch import nn

from ..errors import UserError, require
from .folders import (
    checked,
    has_weights,
    local_copy,
    quiet,
    readable,
    refuse_large_vocabulary,
    refuse_missing,
    replacing,
    write_card,
)
from .lora import has_lora, plain, plain_state

LOADERS = ("transformers", "huggingface_hub", "safetensors")  # what reading a model folder needs


def load_causal_lm(path, *, dtype=torch.float32, tokenizer=None, trust_remote_code=False, allow_pickle=False):
    """-> a causal LM from a folder or the Hub, attention by SDPA where the architecture has it.

    tokenizer: when given, its vocabulary must fit the embedding. UserError: no folder, no config.json, no
    weights, or weights missing from them (a score model has no language-model head), a vocabulary larger than
    the embedding, weights in pickles alone without allow_pickle (then tensors are taken from them, and
    nothing is run).
    """
    require("load_causal_lm", "train", *LOADERS)
    folder = checked(path)
    if folder is not None and not has_weights(folder):
        raise UserError(f"{path} has no weights; expected a file that ends in .safetensors or .bin")
    folder = local_copy(path, allow_pickle)
    from transformers import AutoModelForCausalLM

    with readable(path, "causal language model"), quiet():
        lm, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **allowed_files(allow_pickle),
        )
    refuse_missing(path, info, "causal language model")
    if tokenizer is not None:
        refuse_large_vocabulary(path, tokenizer, lm.get_input_embeddings().weight.shape[0])
    train_every_row(lm)
    lm.config.use_cache = True  # for `generate`; training passes use_cache=False itself
    return lm


def allowed_files(allow_pickle):
    """What transformers may read: safetensors alone, or pickles too, but only tensors of them."""
    return {"use_safetensors": None if allow_pickle else True, "weights_only": True}


def train_every_row(model):
    """Lets the padding token's embedding learn, in place.

    An nn.Embedding has no gradient at its padding_idx. With pad == eos (or pad == unk) that is a token that
    the model reads in earnest; where it is padding the mask keeps gradients away by itself.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def savable_generation(generation, tokenizer):
    """-> a copy of a generation config that transformers can save, with the tokenizer's ids where it has
    none.
    """
    generation = copy.deepcopy(generation)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name, None) is None:
            setattr(generation, name, getattr(tokenizer, name))
    # Some published configs give a temperature without sampling, which transformers loads but refuses to
    # save.
    if any(
        getattr(generation, name, None) not in (None, plain_value)
        for name, plain_value in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 50))
    ):
        generation.do_sample = True
    return generation


def save_causal_lm(folder, model, tokenizer, state_dict=None, card=None):
    """Writes a causal LM: safetensors, tokenizer with chat template, generation config, model card.

    Adapters are merged into what is written, not into the model. state_dict: weights to write instead of the
    model's (of a plain model: {name: tensor}). An existing model folder is replaced at the end.
    """
    assert state_dict is None or not has_lora(model), "a state dict of a model with adapters cannot be merged"
    lm = plain(model)
    state = plain_state(model) if state_dict is None else dict(state_dict)
    lm.generation_config = savable_generation(lm.generation_config, tokenizer)
    with replacing(folder) as new, quiet():
        lm.save_pretrained(new, state_dict=state)
        tokenizer.save_pretrained(new)
        write_card(new, "policy", card)


def without_dropout(model):
    """Switches every dropout off, in place: the log-probs of a rollout and of its update must be the same
    function.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
