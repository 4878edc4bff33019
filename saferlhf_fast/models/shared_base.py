"""One frozen base for a whole PPO run, and a low-rank adapter (peft) for each role on it.

The actor is the base with its adapter; the reference is the base alone; critics, and score models that were
trained as adapters of the same base, are the base with theirs and a head of their own. A role's engine holds
its adapter and head alone, so gradients, optimiser states and clipping are per role, as with separate models,
and the base lies in memory once.

Which adapter is on is state of the base: every forward sets it, and so does every backward
(`before_backward`), since activation checkpointing runs the forward again there. Leaves out: ZeRO-3, whose
hooks belong to one engine.
"""

import torch
from torch import nn

from . import backbone, multi_adapter
from .lora import plain
from .policy import Policy
from .score_model import ScoreHead, hidden_size


class SharedBase:
    """A causal LM with adapters, one of which is on at a time.

    lm: on its device, in its dtype; frozen here · lora: a Lora config.
    """

    def __init__(self, lm, lora, packing=True):
        lm.requires_grad_(False)
        self.lora, self.lm = lora, None
        self.base = lm
        self.packs = backbone.packs(lm.base_model) and packing
        self.packing = packing
        self.layers = []

    def add(self, role, saved=None):
        """A new adapter, which changes nothing yet; saved: an `adapters.Saved` to begin with, its rank
        included.
        """
        self.lm = multi_adapter.add(self.lm or self.base, self.lora if saved is None else saved.config, role)
        self.layers = multi_adapter.layers(self.lm)
        if saved is not None:
            multi_adapter.load(self.lm, role, saved.state)

    def use(self, role):
        """Switches a role's adapter on, all others off; None: the base alone."""
        multi_adapter.use(self.layers, role)

    def weights(self, role):
        """The parameters of a role's adapter."""
        return multi_adapter.parameters(self.lm, role)


class OnSharedBase(nn.Module):
    """What roles share: their weights are an adapter's, and the base is not theirs."""

    def __init__(self, shared_base, role):
        super().__init__()
        self.role = role
        self.adapter = nn.ParameterList(shared_base.weights(role) if role else [])
        # not a submodule: an engine must not see the base
        object.__setattr__(self, "shared_base", shared_base)

    def train(self, mode=True):
        self.shared_base.lm.train(mode)
        return super().train(mode)

    def before_backward(self):
        """What is run again in the backward must be run with this adapter."""
        self.shared_base.use(self.role)


class PolicyOnSharedBase(OnSharedBase):
    """A `Policy` on the shared base: the actor, or the reference (role None)."""

    def __init__(self, shared_base, role):
        super().__init__(shared_base, role)
        object.__setattr__(self, "policy", Policy(shared_base.lm, shared_base.packing))

    @property
    def lm(self):
        """The causal LM with this role's adapter on."""
        self.shared_base.use(self.role)
        return self.shared_base.lm

    def forward(self, *args, **kwargs):
        self.shared_base.use(self.role)
        return self.policy(*args, **kwargs)


class ScoreOnSharedBase(OnSharedBase):
    """A score model or critic on the shared base: one number per asked-for position, or one for each of
    several heads.
    """

    def __init__(self, shared_base, role, head=None, heads=1):
        """head: weight [heads, H] to start from; drawn as a new score model's when None."""
        super().__init__(shared_base, role)
        config = plain(shared_base.lm).config
        self.score = ScoreHead(hidden_size(config), outputs=heads)
        std = getattr(config.get_text_config(), "initializer_range", None) or 0.02
        with torch.no_grad():
            self.score.weight.normal_(0.0, std) if head is None else self.score.weight.copy_(head)

    def forward(self, packed):
        self.shared_base.use(self.role)
        hidden_MH = backbone.hidden_states(
            plain(self.shared_base.lm).base_model, packed, self.shared_base.packs
        )
        return self.score(hidden_MH.index_select(0, packed.rows_N))
