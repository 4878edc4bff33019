"""Tiny models and naive sampling for the tests of rollout engines."""

from types import SimpleNamespace

import kit
import torch

VOCABULARY = 61


def llama(seed=0, vocabulary=VOCABULARY, layers=2, **changes):
    """A random Llama in evaluation mode, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**common, **changes})).eval()


def actor(lm, sharded=False):
    """A causal LM with the attributes of engine.Frozen that generation reads."""
    return SimpleNamespace(module=SimpleNamespace(lm=lm), sharded=sharded)


def tokenizer():
    """A tokenizer with one word for each id."""
    word_tokenizer = kit.make_tokenizer(extra=[f"w{i}" for i in range(30)])
    assert len(word_tokenizer) == VOCABULARY
    return word_tokenizer


def prompts(count=7, vocabulary=VOCABULARY, longest=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=draw).tolist()
    return [torch.randint(4, vocabulary, (n,), generator=draw).tolist() for n in lengths]


@torch.no_grad()
def naive(lm, prompt, seed, limit, ends, sampling, spare=None):
    """(ids, log-probs, ended) of one sequence by full forward passes and a sum over the vocabulary."""
    from saferlhf_fast.models.sampling_distribution import sampling_logits

    numbers = torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids, logp = list(prompt), []
    for number in numbers:
        logits = lm(input_ids=torch.tensor([ids])).logits[0, -1:].float()
        scores = (
            sampling_logits(logits, sampling, torch.tensor([ids]), spare_U=spare)[0].double().log_softmax(-1)
        )
        token = int((scores.exp().cumsum(-1) <= number).sum())
        ids.append(token)
        logp.append(float(scores[token]))
        if token in ends:
            return ids[len(prompt) :], logp, True
    return ids[len(prompt) :], logp, False


def settings(**changes):
    from saferlhf_fast.config.stages import Sampling

    return Sampling(**changes)
