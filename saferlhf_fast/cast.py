"""The models of a PPO run: actor, reference, reward and cost model, their critics, loaded and handed to DeepSpeed."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import torch

from .data.examples import retokenize
from .errors import UserError
from .generation import open_generator
from .models import backbone, multi_adapter
from .models.causal_lm import load_causal_lm, without_dropout
from .models.folders import refuse_short_context
from .models.packing import end_row, pack_sequences
from .models.policy import Policy
from .models.score_model import load_score_model
from .models.shared_base import OnTrunk, PolicyOnTrunk, ScoreOnTrunk, Trunk
from .models.tokenizer import load_tokenizer, same_tokenizer
from .rollout import end_tokens
from .runtime import console, engine


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
    generator: Any = None            # a rollout engine of saferlhf_fast.generation

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


def load_cast(cfg, tokenizer, steps, constrained):
    """Loads every model that a PPOConfig names and makes the engines.

    steps: optimiser steps of the run · constrained: with a cost critic (ppo-lag).
    """
    lm = load_causal_lm(cfg.model, tokenizer=tokenizer, trust_remote_code=cfg.trust_remote_code,
                        allow_pickle=cfg.allow_pickle)
    refuse_short_context(cfg.model, lm.config, cfg.max_length, "max_length")
    if cfg.gradient_checkpointing:
        backbone.recompute_activations(lm)
    cast = (cast_on_trunk if cfg.lora.rank else cast_of_models)(cfg, lm, tokenizer, steps, constrained)
    ends = end_tokens(tokenizer, lm, cfg.template)
    return dataclasses.replace(cast, ends=ends, generator=open_generator(cast.actor, tokenizer, ends, cfg.sampling))


def cast_of_models(cfg, lm, tokenizer, steps, constrained):
    """-> Cast of separate models, all of whose weights are trained."""
    packing = cfg.engine.packing
    reference = engine.Frozen(Policy(copy.deepcopy(lm), packing), cfg.engine)
    reward, reward_score = load_judge(cfg.reward, tokenizer, cfg)
    cost, cost_score = load_judge(cfg.cost, tokenizer, cfg) if cfg.cost else (None, None)
    actor = engine.Engine(Policy(without_dropout(lm), packing), cfg.optim, cfg.engine, steps)
    shared = constrained and cfg.ppo.shared_critic
    reward_critic = load_critic(cfg, "reward", cfg.reward_critic, reward, reward_score, tokenizer, steps, shared)
    cost_critic = reward_critic if shared else None
    if constrained and not shared:
        cost_critic = load_critic(cfg, "cost", cfg.cost_critic, cost, cost_score, tokenizer, steps)
    return Cast(tokenizer, [], actor, reference, reward, reward_critic, cost, cost_critic)


def load_critic(cfg, name, path, judge, score, tokenizer, steps, two_heads=False):
    """-> Engine of a critic: from its own path, or from its judge's ScoreModel where that reads the actor's ids."""
    def fresh(path):
        return load_score_model(path, new_head=True, tokenizer=tokenizer, trust_remote_code=cfg.trust_remote_code,
                                allow_pickle=cfg.allow_pickle)

    if path is not None:
        own = load_tokenizer(path, trust_remote_code=cfg.trust_remote_code)
        if not same_tokenizer(tokenizer, own):
            raise UserError(f"{name}_critic: {path} has another tokenizer than {cfg.model}, whose ids it would read; "
                            "expected a model with the same one")
        score = fresh(path)
    elif judge.retokenizes:
        console.say(f"{name}: another tokenizer than the actor's, so the critic starts from {cfg.model} with a new "
                    f"head; {name}_critic names another start")
        score = fresh(cfg.model)
    if cfg.gradient_checkpointing:
        backbone.recompute_activations(score.backbone)
    score.packs &= cfg.engine.packing
    if two_heads:
        score.add_head()
    return engine.Engine(without_dropout(score), cfg.critic_optim, cfg.engine, steps)


def cast_on_trunk(cfg, lm, tokenizer, steps, constrained):
    """-> Cast of adapters on one frozen base; score models of another base are whole models beside it."""
    trunk = Trunk(without_dropout(lm).to(engine.device(), engine.precision(cfg.engine)), cfg.lora, cfg.engine.packing)
    trunk.add("actor")
    saved = {"reward": multi_adapter.of_score(cfg.reward, cfg.model),
             "cost": multi_adapter.of_score(cfg.cost, cfg.model) if cfg.cost else None}

    def judge(name, path):
        if saved[name] is None:
            return load_judge(path, tokenizer, cfg)[0]
        trunk.add(name, saved[name])
        model = engine.Frozen(ScoreOnTrunk(trunk, name, saved[name].head), cfg.engine)
        return Judge(model, tokenizer, cfg.template, False)

    def critic(role, start, heads=1):
        trunk.add(role, start)
        head = None if start is None or heads > 1 else start.head
        return engine.Engine(ScoreOnTrunk(trunk, role, head, heads), cfg.critic_optim, cfg.engine, steps)

    reward = judge("reward", cfg.reward)
    cost = judge("cost", cfg.cost) if cfg.cost else None
    for name, found in saved.items():
        if found is None and getattr(cfg, name):
            console.say(f"{name}: a whole model beside the trunk, whose critic starts without it; trained with lora.rank on "
                        f"{cfg.model} it would be an adapter")
    shared = constrained and cfg.ppo.shared_critic
    reward_critic = critic("critic" if shared else "reward_critic", saved["reward"], 2 if shared else 1)
    cost_critic = reward_critic if shared else critic("cost_critic", saved["cost"]) if constrained else None
    actor = engine.Engine(PolicyOnTrunk(trunk, "actor"), cfg.optim, cfg.engine, steps)
    reference = engine.Frozen(PolicyOnTrunk(trunk, None), cfg.engine)
    return Cast(tokenizer, [], actor, reference, reward, reward_critic, cost, cost_critic)
