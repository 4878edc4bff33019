"""The models of a PPO run: actor, reference, reward and cost model, their critics, loaded and handed to DeepSpeed."""

import copy
from dataclasses import dataclass
from typing import Any, Optional

import torch

from . import console, data, engine, models
from .errors import UserError
from .generation import open_generator
from .packing import end_row, pack
from .policy import Policy
from .rollout import end_tokens


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
        ids = data.retokenize([p.messages for p in rollout.prompts[rows]], rollout.texts[rows], self.tokenizer,
                              self.template, ended=rollout.ended[rows],
                              max_length=getattr(self.model.module.backbone.config, "max_position_embeddings", None))
        return self.model(pack(ids, [end_row(len(row)) for row in ids], rollout.device))


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
        """Reward critic, then the cost critic where there is one."""
        return [critic for _, critic in self.streams() if critic is not None]

    def streams(self):
        """("reward", its critic), ("cost", its critic or None)."""
        return (("reward", self.reward_critic), ("cost", self.cost_critic))

    def train(self, mode=True):
        """Puts actor and critics into training mode, or out of it."""
        for model in (self.actor, *self.critics):
            model.train(mode)

    def has_dropout(self):
        """True when a trained model drops anything out (adapters may; the models' own is off)."""
        return any(isinstance(module, torch.nn.Dropout) and module.p > 0
                   for model in (self.actor, *self.critics) for module in model.module.modules())


def load_judge(path, tokenizer, cfg):
    """A frozen score model for texts of a policy with `tokenizer` -> (Judge, ScoreModel in fp32 for a critic)."""
    own = models.load_tokenizer(path, trust_remote_code=cfg.trust_remote_code)
    score = models.load_score_model(path, tokenizer=own, trust_remote_code=cfg.trust_remote_code)
    differs = not models.same_tokenizer(tokenizer, own)
    if not differs:                                  # else texts are cut to what it can read
        models.refuse_short_context(path, score.config, cfg.max_length, "max_length")
    score.packs &= cfg.engine.packing
    return Judge(engine.Frozen(copy.deepcopy(score), cfg.engine), own, cfg.template, differs), score


def load_cast(cfg, tokenizer, steps, constrained):
    """Loads every model that a PPOConfig names and makes the engines.

    steps: optimiser steps of the run · constrained: with a cost critic (ppo-lag).
    """
    lm = models.load_causal_lm(cfg.model, tokenizer=tokenizer, trust_remote_code=cfg.trust_remote_code)
    models.refuse_short_context(cfg.model, lm.config, cfg.max_length, "max_length")
    packing = cfg.engine.packing
    reference = engine.Frozen(Policy(copy.deepcopy(lm), packing), cfg.engine)
    reward, reward_score = load_judge(cfg.reward, tokenizer, cfg)
    cost, cost_score = load_judge(cfg.cost, tokenizer, cfg) if cfg.cost else (None, None)
    if cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    actor = engine.Engine(Policy(without_dropout(lm), packing), cfg.optim, cfg.engine, steps)

    def fresh(path):
        return models.load_score_model(path, new_head=True, tokenizer=tokenizer,
                                       trust_remote_code=cfg.trust_remote_code)

    def critic(path, judge, score, name):
        if path is not None:
            own = models.load_tokenizer(path, trust_remote_code=cfg.trust_remote_code)
            if not models.same_tokenizer(tokenizer, own):
                raise UserError(f"{name}_critic: {path} has another tokenizer than {cfg.model}, whose ids it would read; "
                                "expected a model with the same one")
            score = fresh(path)
        elif judge.retokenizes:
            console.say(f"{name}: another tokenizer than the actor's, so the critic starts from {cfg.model} with a new "
                        f"head; {name}_critic names another start")
            score = fresh(cfg.model)
        if cfg.gradient_checkpointing:
            score.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        score.packs &= packing
        return engine.Engine(without_dropout(score), cfg.critic_optim, cfg.engine, steps)

    ends = end_tokens(tokenizer, lm, cfg.template)
    return Cast(tokenizer, ends, actor, reference, reward,
                critic(cfg.reward_critic, reward, reward_score, "reward"), cost,
                critic(cfg.cost_critic, cost, cost_score, "cost") if constrained else None,
                open_generator(actor, tokenizer, ends, cfg.sampling))


def without_dropout(model):
    """Switches every dropout off, in place: the log-probs of a rollout and of its update must be the same function."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
