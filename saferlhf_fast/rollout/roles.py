"""The models that score a rollout and the policy that makes it, by role: what every stage with rollouts hands around."""

import copy
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..data.examples import retokenize
from ..models.folders import refuse_short_context
from ..models.packing import end_row, pack_sequences
from ..models.score_model import load_score_model
from ..models.shared_base import OnTrunk
from ..models.tokenizer import load_tokenizer, same_tokenizer
from ..runtime import engine


@dataclass(frozen=True)
class Judge:
    """A frozen score model with its own tokenizer; text is re-tokenised where that differs from the actor's."""

    model: engine.Frozen
    tokenizer: Any
    template: str
    retokenizes: bool

    def __call__(self, rollout, rows):
        """-> scores_b of some rows of a rollout, fp32."""
        if not self.retokenizes or rows.start == rows.stop:      # the filler's score is left out by who asks
            return self.model(rollout.packed(rows, at_end=True))
        ids = retokenize([p.messages for p in rollout.prompts[rows]], rollout.texts[rows], self.tokenizer,
                         self.template, ended=rollout.ended[rows],
                         max_length=getattr(self.model.module.backbone.config, "max_position_embeddings", None))
        return self.model(pack_sequences(ids, [end_row(len(row)) for row in ids], rollout.device))


@dataclass(frozen=True)
class Cast:
    """Who plays in a PPO run. Without a cost critic there is no constraint."""

    tokenizer: Any
    ends: list                       # token ids that end a response
    actor: engine.Engine
    reference: engine.Frozen
    reward: Judge
    reward_critic: engine.Engine
    cost: Optional[Judge] = None
    cost_critic: Optional[engine.Engine] = None
    generator: Any = None            # a rollout engine of saferlhf_fast.rollout.engines

    @property
    def critics(self):
        """The critics there are: reward, then cost; or one for both."""
        if self.cost_critic is None:
            return [Critic(self.reward_critic, ("reward",))]
        if self.cost_critic is self.reward_critic:
            return [Critic(self.reward_critic, ("reward", "cost"))]
        return [Critic(self.reward_critic, ("reward",)), Critic(self.cost_critic, ("cost",))]

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
        return any(isinstance(module, torch.nn.Dropout) and module.p > 0
                   for model in self.trained for module in whole(model.module).modules())


def whole(module):
    """A trained module with the base that it stands on, if it is an adapter."""
    return module.trunk.lm if isinstance(module, OnTrunk) else module


@dataclass(frozen=True)
class Critic:
    """A trained model that gives values of one stream, or of both by two heads."""

    engine: engine.Engine
    names: tuple

    def __call__(self, packed):
        """-> {"reward": values_N, …} before each asked-for token, fp32."""
        values = self.engine(packed)
        return {self.names[0]: values} if len(self.names) == 1 else dict(zip(self.names, values.unbind(-1)))


def load_judge(path, tokenizer, cfg):
    """A frozen score model for texts of a policy with `tokenizer` -> (Judge, ScoreModel in fp32 for a critic)."""
    own = load_tokenizer(path, trust_remote_code=cfg.trust_remote_code)
    score = load_score_model(path, tokenizer=own, trust_remote_code=cfg.trust_remote_code,
                             allow_pickle=cfg.allow_pickle)
    differs = not same_tokenizer(tokenizer, own)
    if not differs:                                  # else texts are cut to what it can read
        refuse_short_context(path, score.config, cfg.max_length, "max_length")
    score.packs &= cfg.engine.packing
    return Judge(engine.Frozen(copy.deepcopy(score), cfg.engine), own, cfg.template, differs), score
