"""Tiny models of several architectures, and batches, for the tests of the transformers patch."""

import torch
import transformers
from tolerance import TABLE

V = 97
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
KINDS = {
    "llama": ("Llama", {"num_key_value_heads": 1}),
    "llama-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 4},
    ),
    "cohere": ("Cohere", {"num_key_value_heads": 1, "logit_scale": 0.25}),
    "granite": ("Granite", {"num_key_value_heads": 1, "logits_scaling": 3.0}),
    "gpt2": ("GPT2", {"intermediate_size": None, "n_inner": 24}),
}


def make(kind="llama", dtype=torch.float32, **changes):
    name, settings = KINDS[kind]
    settings = {**SMALL, **settings, **changes}
    config = getattr(transformers, f"{name}Config")(**{k: v for k, v in settings.items() if v is not None})
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    torch.manual_seed(0)
    return getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM"))(config).to(
        dtype
    )


def random_batch(seed):
    """ids, mask with padding on either side, labels with -100 at padding and here and there."""
    made = torch.Generator().manual_seed(seed)
    rows, columns = (int(torch.randint(1, most, (), generator=made)) for most in (5, 14))
    ids = torch.randint(0, V, (rows, columns), generator=made)
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=made)
    at = torch.arange(columns).expand(rows, columns)
    mask = (at < lengths) if seed % 2 else (at >= columns - lengths)
    labels = ids.where(mask & (torch.rand(rows, columns, generator=made) < 0.8), -100)
    return ids, mask.long(), labels


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g.double() for g in found]


def close(got, expected, dtype):
    """A tensor, or the gradients of all parameters, held to the largest entry: sums run in another order, and
    cancel.
    """
    relative = 2 * TABLE[torch.float32][0] if dtype == torch.float32 else 0.1
    pairs = list(zip(got, expected, strict=True)) if isinstance(got, list) else [(got, expected)]
    scale = max(
        (e.detach().double().nan_to_num().abs().max().item() for _, e in pairs if e.numel()), default=0.0
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(
            mine.double(), theirs.double(), rtol=relative, atol=relative * max(scale, 1e-3), equal_nan=True
        )
