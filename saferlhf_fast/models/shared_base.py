"""One frozen base for a complete PPO run, and a low-rank adapter (peft) for each role on it.

The actor is the base with its adapter; the reference is the base alone; critics, and score models that were
trained as adapters of the same base, are the base with their adapter and a head of their own. A role's engine
holds its adapter and head alone, so gradients, optimiser states and clipping are per role, as with separate
models, and the base is in memory once.

Which adapter is on is state of the base: every forward sets it, and so does every backward
(`before_backward`), since activation checkpointing runs the forward again there. Leaves out: ZeRO-3, whose
hooks belong to one engine.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import backbone, multi_adapter, quantized
from .lora import plain
from .policy import Policy
from .score_model import ScoreHead, hidden_size

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    from ..config.sections import Lora
    from .packing import Packed


class SharedBase:
    """A causal LM with adapters, one of which is on at a time."""

    lm: "PeftModel"  # set by the first `add`

    def __init__(
        self,
        lm: "PreTrainedModel",
        lora: "Lora",
        packing: bool = True,
        spare_U: torch.Tensor | None = None,
    ) -> None:
        """Freezes a causal LM.

        Args:
            lm: On its device, in its dtype.
            lora: The form of new adapters.
            packing: False runs the backbone on padded rows, whatever the architecture can.
            spare_U: As in `Policy`.
        """
        lm.requires_grad_(False)
        self.spare_U = spare_U
        self.lora, self.lm = lora, None
        self.base = lm
        form = backbone.form_of(lm.base_model)
        self.form = form if packing else form.unpacked()
        self.packing = packing
        self.layers: list[BaseTunerLayer] = []

    def add(self, role: str, saved: multi_adapter.Saved | None = None) -> None:
        """Adds an adapter.

        Args:
            role: Its name.
            saved: Weights and form (the rank included) to start with; None: a new one that changes nothing
                yet.
        """
        self.lm = multi_adapter.add(self.lm or self.base, self.lora if saved is None else saved.config, role)
        self.layers = multi_adapter.layers(self.lm)
        if saved is not None:
            multi_adapter.load(self.lm, role, saved.state)

    def use(self, role: str | None) -> None:
        """Switches a role's adapter on, all others off; None: the base alone."""
        multi_adapter.use(self.layers, role)

    def weights(self, role: str) -> list[nn.Parameter]:
        """The parameters of a role's adapter."""
        return multi_adapter.parameters(self.lm, role)


class OnSharedBase(nn.Module):
    """What all roles on a shared base have: the weights of an adapter, and a base that they do not own."""

    shared_base: SharedBase

    def __init__(self, shared_base: SharedBase, role: str | None) -> None:
        super().__init__()
        self.role = role
        self.adapter = nn.ParameterList(shared_base.weights(role) if role else [])
        # not a submodule: an engine must not see the base
        object.__setattr__(self, "shared_base", shared_base)

    def train(self, mode: bool = True) -> "OnSharedBase":
        """Sets training mode here and on the base."""
        self.shared_base.lm.train(mode)
        return super().train(mode)

    def base_hash(self) -> str | None:
        """The sha256 of a base in 4 bits, which checkpoints compare; None for another one."""
        return quantized.base_hash(plain(self.shared_base.lm))

    def before_backward(self) -> None:
        """Switches this adapter on, for what the backward runs again."""
        self.shared_base.use(self.role)


class PolicyOnSharedBase(OnSharedBase):
    """A `Policy` on the shared base: the actor, or the reference (role None)."""

    policy: Policy

    def __init__(self, shared_base: SharedBase, role: str | None) -> None:
        super().__init__(shared_base, role)
        object.__setattr__(self, "policy", Policy(shared_base.lm, shared_base.packing, shared_base.spare_U))

    @property
    def lm(self) -> "PeftModel":
        """The causal LM with this role's adapter on."""
        self.shared_base.use(self.role)
        return self.shared_base.lm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`Policy.forward` with this role's adapter on."""
        self.shared_base.use(self.role)
        return self.policy(*args, **kwargs)


class ScoreOnSharedBase(OnSharedBase):
    """A score model or critic on the shared base: one number per requested position and head."""

    def __init__(
        self, shared_base: SharedBase, role: str, head: torch.Tensor | None = None, heads: int = 1
    ) -> None:
        """Makes a head for a role whose adapter the base has.

        Args:
            shared_base: The base.
            role: The adapter's name.
            head: Weight [heads, H] to start from; None: drawn as for a new score model.
            heads: Number of streams.
        """
        super().__init__(shared_base, role)
        config = plain(shared_base.lm).config
        self.score = ScoreHead(hidden_size(config), outputs=heads)
        std = getattr(config.get_text_config(), "initializer_range", None) or 0.02
        with torch.no_grad():
            self.score.weight.normal_(0.0, std) if head is None else self.score.weight.copy_(head)

    def forward(self, packed: "Packed") -> torch.Tensor:
        """Scores [N], or [N, heads] where there are several, fp32."""
        self.shared_base.use(self.role)
        hidden_MH = backbone.hidden_states(
            plain(self.shared_base.lm).base_model, packed, self.shared_base.form
        )
        return self.score(hidden_MH.index_select(0, packed.rows_N))
