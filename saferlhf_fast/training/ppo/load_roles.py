"""Loads the models of a PPO run and hands them to DeepSpeed: actor, reference, reward and cost model, their
critics.
"""

import copy
import dataclasses

from ...errors import UserError
from ...models import backbone, multi_adapter
from ...models.causal_lm import load_causal_lm, without_dropout
from ...models.export_files import export_metadata_writer
from ...models.folders import refuse_short_context
from ...models.policy import Policy
from ...models.score_model import load_score_model
from ...models.shared_base import PolicyOnSharedBase, ScoreOnSharedBase, SharedBase
from ...models.tokenizer import load_tokenizer, same_tokenizer
from ...rollout.batch import end_tokens
from ...rollout.engines import open_generator
from ...rollout.roles import Critic, Roles
from ...rollout.scorers import ScoreModelScorer, load_scorer
from ...rollout.types import per_stream
from ...runtime import console, engine


def load_roles(cfg, tokenizer, steps, constrained):
    """Loads every model that a PPOConfig names and makes the engines.

    steps: optimiser steps of the run · constrained: with a critic for each cost (ppo-lag).
    """
    lm = load_causal_lm(
        cfg.model, tokenizer=tokenizer, trust_remote_code=cfg.trust_remote_code, allow_pickle=cfg.allow_pickle
    )
    refuse_short_context(cfg.model, lm.config, cfg.max_length, "max_length")
    if cfg.gradient_checkpointing:
        backbone.recompute_activations(lm)
    roles = (roles_on_shared_base if cfg.lora.rank else separate_roles)(
        cfg, lm, tokenizer, steps, constrained
    )
    ends = end_tokens(tokenizer, lm, cfg.template)
    return dataclasses.replace(
        roles, ends=ends, generator=open_generator(roles.actor, tokenizer, ends, cfg.sampling)
    )


def separate_roles(cfg, lm, tokenizer, steps, constrained):
    """-> Roles of separate models, all of whose weights are trained."""
    packing = cfg.engine.packing
    reference = engine.Frozen(Policy(copy.deepcopy(lm), packing), cfg.engine)
    loaded = {name: load_scorer(spec, tokenizer, cfg) for name, spec in cfg.scorers().items()}
    actor = engine.Engine(Policy(without_dropout(lm), packing), cfg.optim, cfg.engine, steps)
    critics = [
        Critic(load_critic(cfg, streams, *loaded[streams[0]], tokenizer, steps), streams)
        for streams in cfg.streams_of_critics(constrained)
    ]
    scorers = {name: scorer for name, (scorer, _) in loaded.items()}
    return Roles(tokenizer, [], actor, reference, scorers, critics)


def load_critic(cfg, streams, scorer, score, tokenizer, steps):
    """-> Engine of a critic: from its own path, or from the ScoreModel that scores its first stream where
    that reads the actor's ids, else from the actor's model with a new head.
    """

    def fresh(path):
        return load_score_model(
            path,
            new_head=True,
            tokenizer=tokenizer,
            trust_remote_code=cfg.trust_remote_code,
            allow_pickle=cfg.allow_pickle,
        )

    setting, path = cfg.critic_settings()[streams[0]]
    if path is not None:
        own = load_tokenizer(path, trust_remote_code=cfg.trust_remote_code)
        if not same_tokenizer(tokenizer, own):
            raise UserError(
                f"{setting}: {path} has another tokenizer than {cfg.model}, whose ids it would read; "
                "expected a model with the same one"
            )
        score = fresh(path)
    elif score is None or scorer.retokenizes:
        why = "no score model" if score is None else "another tokenizer than the actor's"
        console.say(
            f"{streams[0]}: {why}, so the critic starts from {cfg.model} with a new head; {setting} names "
            f"another start"
        )
        score = fresh(cfg.model)
    if cfg.gradient_checkpointing:
        backbone.recompute_activations(score.backbone)
    score.packs &= cfg.engine.packing
    for _ in streams[1:]:
        score.add_head()
    return engine.Engine(without_dropout(score), cfg.critic_optim, cfg.engine, steps)


def roles_on_shared_base(cfg, lm, tokenizer, steps, constrained):
    """-> Roles of adapters on one frozen base; score models of another base are whole models beside it."""
    shared_base = SharedBase(
        without_dropout(lm).to(engine.device(), engine.precision(cfg.engine)), cfg.lora, cfg.engine.packing
    )
    shared_base.add("actor")
    specs = cfg.scorers()
    saved = {name: multi_adapter.of_score(spec.path, cfg.model) for name, spec in specs.items()}

    def scorer(name, spec):
        if saved[name] is None:
            return load_scorer(spec, tokenizer, cfg)[0]
        shared_base.add(f"{name}_model", saved[name])
        model = engine.Frozen(ScoreOnSharedBase(shared_base, f"{name}_model", saved[name].head), cfg.engine)
        return ScoreModelScorer(model, tokenizer, cfg.template, False)

    def critic(streams):
        start, role, heads = (
            saved[streams[0]],
            "critic" if len(streams) > 1 else f"{streams[0]}_critic",
            len(streams),
        )
        shared_base.add(role, start)
        head = None if start is None or heads > 1 else start.head
        model = ScoreOnSharedBase(shared_base, role, head, heads)
        return Critic(engine.Engine(model, cfg.critic_optim, cfg.engine, steps), streams)

    scorers = {name: scorer(name, spec) for name, spec in specs.items()}
    for name, adapter in saved.items():
        if adapter is None:
            console.say(
                f"{name}: a whole model beside the shared base, whose critic starts without it; trained with "
                f"lora.rank "
                f"on {cfg.model} it would be an adapter"
            )
    critics = [critic(streams) for streams in cfg.streams_of_critics(constrained)]
    actor = engine.Engine(PolicyOnSharedBase(shared_base, "actor"), cfg.optim, cfg.engine, steps)
    reference = engine.Frozen(PolicyOnSharedBase(shared_base, None), cfg.engine)
    return Roles(tokenizer, [], actor, reference, scorers, critics)


def engines_of(roles):
    """{name: Engine} of the trained models, by which a checkpoint knows them: actor, reward_critic,
    cost_critic; of several constraints cost_critic-<name>; critic where there is one for all streams.
    """

    def name_of(critic):
        if len(critic.names) > 1:
            return "critic"
        return per_stream("critic", critic.names[0], roles.constraints).replace("/", "-")

    return {"actor": roles.actor, **{name_of(critic): critic.engine for critic in roles.critics}}


def export_metadata_writers(roles, tokenizer):
    """{name: function that describes a trained model for exports}."""
    return {
        name: export_metadata_writer(model.module, tokenizer) for name, model in engines_of(roles).items()
    }
