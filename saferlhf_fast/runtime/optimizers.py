"""The optimisers that a recipe can name (`optim.kind`), and what each of them stores for a trained weight.

    adamw        torch's AdamW: two moments, 8 bytes a weight
    adamw-8bit   bitsandbytes' AdamW: both moments in 8 bits with a scale for every 256 weights, 2.03 bytes a
                 weight; tensors under 4096 elements keep 32 bits. Its CPU code dequantises a whole tensor
                 during a step
    adafactor    transformers' Adafactor (Shazeer and Stern, 2018): of a matrix only the row and column means
                 of its squared gradients, next to nothing; no first moment, so betas and eps have no effect.
                 The learning rate is AdamW's, not relative to the weights' size, and the update is clipped to
                 a root mean square of 1

Weight decay applies to weights of two dimensions and more, not to biases and norms. ZeRO 1 to 3 give an
optimiser flat pieces of several weights. AdamW is elementwise and does not notice; Adafactor loses its rows
and columns, and its state was 4 bytes a weight there, so that combination is refused. torchao's AdamW8bit is
not offered: it keeps a tensor or piece whose size is not a multiple of 256 in 32 bits (under ZeRO that is
nearly every one), compiles for most of a minute on a CPU, and needs its learning rate as a tensor.

Not here: the learning-rate schedule (deepspeed_config.py), DeepSpeed (engine.py), and offload
(engine.offload_optimizer, also for adamw-8bit).
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..config.checks import check_optimizer

if TYPE_CHECKING:
    import torch

    from ..config.sections import Optimizer


def build(module: "torch.nn.Module", optim: "Optimizer", zero_stage: int) -> "torch.optim.Optimizer":
    """Makes the optimiser of a module's weights that require a gradient.

    Args:
        module: The model to train.
        optim: Which optimiser, and its settings.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3.

    Raises:
        UserError: The optimiser does not work under this ZeRO stage, or its package is not installed.
    """
    check_optimizer(optim, zero_stage)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.kind == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=optim.learning_rate, scale_parameter=False, relative_step=False)
    adam: dict[str, Any] = {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps}
    if optim.kind == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **adam)
    import torch

    return torch.optim.AdamW(groups, **adam, fused=True)


@contextlib.contextmanager
def untouched(optimizer: "torch.optim.Optimizer") -> Iterator[None]:
    """Context in which steps neither move a weight nor leave a state behind.

    For ZeRO-0 in bf16 and fp16 DeepSpeed takes a step on gradients of zero during its setup. It counted as
    Adam's first step: the first real one was 0.73 of what it should be (β = 0.9, 0.95), and the weights
    decayed once too often.
    """
    rates = [(group, group["lr"]) for group in optimizer.param_groups]
    for group, _ in rates:
        group["lr"] = 0.0
    yield
    for group, rate in rates:
        group["lr"] = rate
    optimizer.state.clear()
