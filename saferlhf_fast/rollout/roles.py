"""The models that score a rollout and the policy that samples it, by role, for every stage with rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from ..config.sections import REWARD
from ..models.shared_base import OnSharedBase
from ..runtime import engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models.packing import Packed
    from .engines import RolloutEngine
    from .scorers import Scorer


@dataclass(frozen=True)
class Critic:
    """A trained model that gives values of one stream, or of several by a head for each."""

    engine: engine.Engine
    names: tuple[str, ...]  # of its streams: "reward", or a constraint's name

    def __call__(self, packed: "Packed") -> dict[str, torch.Tensor]:
        """{"reward": values_N, …} before each requested token, fp32."""
        values = self.engine(packed)
        return {self.names[0]: values} if len(self.names) == 1 else dict(zip(self.names, values.unbind(-1)))


@dataclass(frozen=True)
class Roles:
    """The models of a PPO run, or of an evaluation, which has no critics and may lack other roles."""

    tokenizer: "PreTrainedTokenizerBase"
    ends: list[int | str]  # token ids that end a response, and end marks of several tokens
    actor: engine.Engine | engine.Frozen  # of a Policy; Frozen in an evaluation, which trains nothing
    reference: engine.Frozen | None  # of a Policy; None where an evaluation has none
    # {"reward": scorer, name of a cost: scorer}, as PPOConfig.scorers() has them
    scorers: "Mapping[str, Scorer]" = field(default_factory=dict)
    # of the reward, then of each constraint; or one for all
    critics: Sequence[Critic] = field(default_factory=list)
    generator: "RolloutEngine | None" = None  # None until all roles are loaded

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs that are scored, whether they are constrained or not."""
        return tuple(name for name in self.scorers if name != REWARD)

    @property
    def constraints(self) -> tuple[str, ...]:
        """Names of the costs that have a critic, and so a multiplier."""
        return tuple(name for critic in self.critics for name in critic.names if name != REWARD)

    @property
    def trained_actor(self) -> engine.Engine:
        """The actor, in a run that trains it."""
        return cast("engine.Engine", self.actor)

    @property
    def rollout_engine(self) -> "RolloutEngine":
        """The engine that samples, after all roles are loaded."""
        assert self.generator is not None, "the rollout engine is opened when all roles are loaded"
        return self.generator

    @property
    def trained(self) -> list[engine.Engine]:
        """Engines of all trained models."""
        return [self.trained_actor, *(critic.engine for critic in self.critics)]

    def train(self, mode: bool = True) -> None:
        """Puts actor and critics into training mode, or out of it."""
        for model in self.trained:
            model.train(mode)

    def has_dropout(self) -> bool:
        """True when a trained model has dropout (adapters may; the models' own is off)."""
        return any(
            isinstance(module, torch.nn.Dropout) and module.p > 0
            for model in self.trained
            for module in with_shared_base(model.module).modules()
        )


def with_shared_base(module: torch.nn.Module) -> torch.nn.Module:
    """The base with its adapters where a trained module is one of them, else the module."""
    return module.shared_base.lm if isinstance(module, OnSharedBase) else module
