"""Loads the models of a PPO run and hands them to DeepSpeed: actor, reference, reward and cost model, their critics."""

import copy
import dataclasses

from ...errors import UserError
from ...models import backbone, multi_adapter
from ...models.causal_lm import load_causal_lm, without_dropout
from ...models.folders import refuse_short_context
from ...models.policy import Policy
from ...models.score_model import load_score_model
from ...models.shared_base import PolicyOnTrunk, ScoreOnTrunk, Trunk
from ...models.tokenizer import load_tokenizer, same_tokenizer
from ...rollout.batch import end_tokens
from ...rollout.engines import open_generator
from ...rollout.roles import Cast, Judge, load_judge
from ...runtime import console, engine


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
