"""The optimisers that a recipe can name (`optim.kind`), and what each remembers of a trained weight.

    adamw        torch's AdamW: two moments, 8 bytes a weight
    adamw-8bit   bitsandbytes' AdamW: both moments in 8 bits with a scale for every 256, 2.03 bytes a weight;
    tensors under 4096
                 elements keep 32 bits. Its CPU code dequantises a whole tensor for a step, for as long as the
                 step takes
    adafactor    transformers' Adafactor (Shazeer and Stern, 2018): of a matrix only the row and column means
    of its squared
                 gradients, next to nothing; no first moment, so betas and eps have no say. The learning rate
                 is AdamW's, not relative to the weights' size, and the update is clipped to a root mean
                 square of 1

Weights of two dimensions and more decay, biases and norms do not. ZeRO 1 to 3 hand an optimiser flat pieces
of weights that belong together, which is nothing to AdamW, but leaves Adafactor without rows and columns: its
state was 4 bytes a weight there, so it is refused. torchao's AdamW8bit is not offered: it leaves a tensor or
piece whose size is not a multiple of 256 in 32 bits (under ZeRO that is nearly every one), compiles for most
of a minute on a CPU, and wants its learning rate as a tensor.

Left out: the learning-rate schedule and DeepSpeed (engine.py), offload (engine.offload_optimizer, also for
adamw-8bit).
"""

import contextlib

from ..config.checks import check_optimizer


def build(module, optim, zero_stage):
    """-> torch optimiser of the weights of an nn.Module that require a gradient. optim: Optimizer config."""
    check_optimizer(optim, zero_stage)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.kind == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=optim.learning_rate, scale_parameter=False, relative_step=False)
    adam = {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps}
    if optim.kind == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **adam)
    import torch

    return torch.optim.AdamW(groups, **adam, fused=True)


@contextlib.contextmanager
def untouched(optimizer):
    """Context in which steps neither move a weight nor leave a state.

    For ZeRO-0 in bf16 and fp16 DeepSpeed takes a step on gradients of zero when it is set up. Counted as
    Adam's first, it made the real first step 0.73 of what it should be (β = 0.9, 0.95), and it let the
    weights decay once more.
    """
    rates = [(group, group["lr"]) for group in optimizer.param_groups]
    for group, _ in rates:
        group["lr"] = 0.0
    yield
    for group, rate in rates:
        group["lr"] = rate
    optimizer.state.clear()
