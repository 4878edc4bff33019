"""What makes scores of hidden states: a linear head, and safe-rlhf's normaliser."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Normalizer:
    """safe-rlhf's score normaliser with fixed statistics, plain numbers that no cast to bf16 can round."""

    function: str  # affine: (s − mean)/std · scale: s/std · translate: s − mean · identity
    mean: float = 0.0
    var: float = 1.0
    eps: float = 1e-8

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of any shape, normalised."""
        std = self.var**0.5 + self.eps
        if self.function == "affine":
            return (scores - self.mean) / std
        if self.function == "scale":
            return scores / std
        return scores - self.mean if self.function == "translate" else scores

    def fields(self) -> dict[str, Any]:
        """What a saved config keeps of it."""
        return {"function": self.function, "mean": self.mean, "var": self.var}


class ScoreHead(nn.Module):
    """Linear(H, outputs) in fp32, whatever the weights' dtype.

    A module of its own: ZeRO-3 gathers a module's own weights.
    """

    def __init__(
        self, hidden_size: int, bias: bool = False, dtype: torch.dtype | None = None, outputs: int = 1
    ) -> None:
        """Allocates the head; the weight is not drawn.

        Args:
            hidden_size: H.
            bias: Whether it has a bias, which is 0 at first.
            dtype: That of the weights; None for torch's default.
            outputs: Scores of each hidden state.
        """
        super().__init__()
        self.outputs = outputs  # ZeRO-3 may leave the weight no shape
        self.weight = nn.Parameter(torch.empty(outputs, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, H] -> […], or […, outputs] where there are several; fp32, under torch.autocast too."""
        bias = None if self.bias is None else self.bias.float()
        with no_autocast(hidden.device.type):
            scores = F.linear(hidden.float(), self.weight.float(), bias)
        return scores.squeeze(-1) if len(self.weight) == 1 else scores


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Context in which F.linear keeps fp32. Not every device has an autocast (meta has none)."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()
