"""The models that score a rollout and the policy that makes it, by role: what every stage with rollouts hands
around.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..config.sections import REWARD
from ..models.shared_base import OnSharedBase
from ..runtime import engine


@dataclass(frozen=True)
class Critic:
    """A trained model that gives values of one stream, or of several by a head for each."""

    engine: engine.Engine
    names: tuple  # of its streams: "reward", or a constraint's name

    def __call__(self, packed):
        """-> {"reward": values_N, …} before each asked-for token, fp32."""
        values = self.engine(packed)
        return {self.names[0]: values} if len(self.names) == 1 else dict(zip(self.names, values.unbind(-1)))


@dataclass(frozen=True)
class Roles:
    """Who plays in a PPO run, or in an evaluation, which has no critics and may lack other roles."""

    tokenizer: Any
    ends: list  # token ids that end a response
    actor: engine.Engine
    reference: engine.Frozen
    # {"reward": scorer, name of a cost: scorer}, as PPOConfig.scorers() has them
    scorers: dict = field(default_factory=dict)
    # Critic of the reward, then of each constraint; or one for all
    critics: list = field(default_factory=list)
    generator: Any = None  # a rollout engine of saferlhf_fast.rollout.engines

    @property
    def costs(self):
        """Names of the costs that are scored, whether they are constrained or not."""
        return tuple(name for name in self.scorers if name != REWARD)

    @property
    def constraints(self):
        """Names of the costs that have a critic, and so a multiplier."""
        return tuple(name for critic in self.critics for name in critic.names if name != REWARD)

    @property
    def trained(self):
        """Engines of all trained models."""
        return [self.actor, *(critic.engine for critic in self.critics)]

    def train(self, mode=True):
        """Puts actor and critics into training mode, or out of it."""
        for model in self.trained:
            model.train(mode)

    def has_dropout(self):
        """True when a trained model drops anything out (adapters may; the models' own is off)."""
        return any(
            isinstance(module, torch.nn.Dropout) and module.p > 0
            for model in self.trained
            for module in whole(model.module).modules()
        )


def whole(module):
    """A trained module with the base that it stands on, if it is an adapter."""
    return module.shared_base.lm if isinstance(module, OnSharedBase) else module
