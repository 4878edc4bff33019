"""Loads the models of a PPO run into DeepSpeed: actor, reference, reward and cost model, their critics."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError
from ...models import backbone, multi_adapter, quantized
from ...models.causal_lm import load_causal_lm, without_dropout
from ...models.encoders import reads_pairs
from ...models.export_files import export_metadata_writer
from ...models.folders import refuse_short_context
from ...models.policy import Policy
from ...models.score_model import load_score_model
from ...models.shared_base import PolicyOnSharedBase, ScoreOnSharedBase, SharedBase
from ...models.tokenizer import load_tokenizer, same_tokenizer, spare_rows
from ...rollout.batch import end_tokens
from ...rollout.engines import open_generator
from ...rollout.roles import Critic, Roles
from ...rollout.scorers import ScoreModelScorer, Scorer, load_scorer
from ...rollout.types import per_stream
from ...runtime import console, engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...config.sections import ScorerSpec
    from ...config.stages import PPOConfig
    from ...models.score_model import ScoreModel


def load_roles(
    cfg: "PPOConfig", tokenizer: "PreTrainedTokenizerBase", steps: int, constrained: bool
) -> Roles:
    """Loads every model that a PPOConfig names, and makes the engines.

    Args:
        cfg: Settings of the stage. With `lora.rank` all models are adapters of one base.
        tokenizer: The actor's tokenizer.
        steps: Optimiser steps of the run, for the learning-rate schedules.
        constrained: True for ppo-lag, where each cost has a critic.

    Returns:
        The roles, ready to sample and to train.

    Raises:
        UserError: If a model cannot be loaded, has another tokenizer, or too short a context.
    """
    lm = load_causal_lm(
        cfg.model,
        tokenizer=tokenizer,
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
        **quantized.options_of_base(cfg.lora, cfg.engine),
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


def separate_roles(
    cfg: "PPOConfig",
    lm: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    steps: int,
    constrained: bool,
) -> Roles:
    """Loads separate models, which are trained in full.

    Args:
        cfg: Settings of the stage.
        lm: The actor's model, with its weights; the reference is a copy of it.
        tokenizer: The actor's tokenizer.
        steps: Optimiser steps of the run, for the learning-rate schedules.
        constrained: True for ppo-lag, where each cost has a critic.

    Returns:
        The roles, still without ends of responses and without a rollout engine.
    """
    packing, spare_U = cfg.engine.packing, spare_rows(tokenizer, lm)
    reference = engine.Frozen(Policy(copy.deepcopy(lm), packing, spare_U), cfg.engine)
    loaded = {name: load_scorer(spec, tokenizer, cfg) for name, spec in cfg.scorers().items()}
    actor = engine.Engine(Policy(without_dropout(lm), packing, spare_U), cfg.optim, cfg.engine, steps)
    critics = []
    for streams in cfg.streams_of_critics(constrained):
        scorer, score = loaded[streams[0]]
        critics.append(Critic(load_critic(cfg, streams, scorer, score, tokenizer, steps), streams))
    scorers = {name: scorer for name, (scorer, _) in loaded.items()}
    return Roles(tokenizer, [], actor, reference, scorers, critics)


def load_critic(
    cfg: "PPOConfig",
    streams: tuple[str, ...],
    scorer: Scorer,
    score: "ScoreModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    steps: int,
) -> engine.Engine:
    """Makes a critic.

    It starts from the path that the settings name for it; without one from the score model of its first
    stream, if that reads the actor's token ids; else from the actor's model with a new head.

    Args:
        cfg: Settings of the stage.
        streams: What the critic predicts: "reward", or a constraint's name; a head for each.
        scorer: The scorer of the first stream.
        score: Its ScoreModel in fp32, or None where the scorer is no score model.
        tokenizer: The actor's tokenizer.
        steps: Optimiser steps of the run.

    Returns:
        The critic in its engine, with a head for each stream.

    Raises:
        UserError: If the named model has another tokenizer than the actor.
    """

    def with_new_head(path: str) -> "ScoreModel":
        return load_score_model(
            path,
            new_head=True,
            tokenizer=tokenizer,
            trust_remote_code=cfg.trust_remote_code,
            allow_pickle=cfg.allow_pickle,
        )

    setting, path = cfg.critic_settings()[streams[0]]
    if path is not None:
        if reads_pairs(path, cfg.trust_remote_code):
            raise UserError(
                f"{setting}: expected a causal language model or a score model on one, got the encoder "
                f"{path}, whose tokens see the tokens after them: a critic predicts before each token"
            )
        own = load_tokenizer(path, trust_remote_code=cfg.trust_remote_code)
        if not same_tokenizer(tokenizer, own):
            raise UserError(
                f"{setting}: {path} has another tokenizer than {cfg.model}, whose ids it would read; "
                "expected a model with the same one"
            )
        score = with_new_head(path)
    elif (why := _why_no_critic(scorer, score)) is not None:
        console.say(
            f"{streams[0]}: {why}, so the critic starts from {cfg.model} with a new head; {setting} names "
            "another start"
        )
        score = with_new_head(cfg.model)
    assert score is not None, "without a score model the critic starts from the actor's model"
    if cfg.gradient_checkpointing:
        backbone.recompute_activations(score.backbone)
    if not cfg.engine.packing:
        score.form = score.form.unpacked()
    for _ in streams[1:]:
        score.add_head()
    return engine.Engine(without_dropout(score), cfg.critic_optim, cfg.engine, steps)


def _why_no_critic(scorer: Scorer, score: "ScoreModel | None") -> str | None:
    """Why a critic cannot start from a scorer's model; None where it can."""
    if score is None:
        return "no score model"
    if score.pairs:
        return "an encoder"
    if score.pooling != "last":
        return f"one score for each sequence (pooling {score.pooling})"
    if isinstance(scorer, ScoreModelScorer) and scorer.retokenizes:
        return "another tokenizer than the actor's"
    return None


def roles_on_shared_base(
    cfg: "PPOConfig",
    lm: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    steps: int,
    constrained: bool,
) -> Roles:
    """Makes all models adapters of one frozen base.

    A score model that was not trained as an adapter of this base is loaded as a separate, full model.

    Args:
        cfg: Settings of the stage, with `lora.rank`.
        lm: The base.
        tokenizer: The actor's tokenizer.
        steps: Optimiser steps of the run, for the learning-rate schedules.
        constrained: True for ppo-lag, where each cost has a critic.

    Returns:
        The roles, still without ends of responses and without a rollout engine.
    """
    shared_base = SharedBase(
        without_dropout(lm).to(engine.device(), engine.precision(cfg.engine)),
        cfg.lora,
        cfg.engine.packing,
        spare_rows(tokenizer, lm),
    )
    shared_base.add("actor")
    specs = cfg.scorers()
    saved = {name: multi_adapter.load_score_adapter(spec.path, cfg.model) for name, spec in specs.items()}

    def scorer(name: str, spec: "ScorerSpec") -> Scorer:
        adapter = saved[name]
        if adapter is None:
            return load_scorer(spec, tokenizer, cfg)[0]
        shared_base.add(f"{name}_model", adapter)
        model = engine.Frozen(ScoreOnSharedBase(shared_base, f"{name}_model", adapter.head), cfg.engine)
        return ScoreModelScorer(model, tokenizer, cfg.template, False)

    def critic(streams: tuple[str, ...]) -> Critic:
        adapter, heads = saved[streams[0]], len(streams)
        role = "critic" if heads > 1 else f"{streams[0]}_critic"
        shared_base.add(role, adapter)
        head = None if adapter is None or heads > 1 else adapter.head
        model = ScoreOnSharedBase(shared_base, role, head, heads)
        return Critic(engine.Engine(model, cfg.critic_optim, cfg.engine, steps), streams)

    scorers = {name: scorer(name, spec) for name, spec in specs.items()}
    for name, adapter in saved.items():
        if adapter is None and reads_pairs(specs[name].path, cfg.trust_remote_code):
            console.say(
                f"{name}: an encoder, which cannot be an adapter of {cfg.model}: a whole model beside the "
                "shared base, whose critic starts without it"
            )
        elif adapter is None:
            console.say(
                f"{name}: a whole model beside the shared base, whose critic starts without it; trained with "
                f"lora.rank on {cfg.model} it would be an adapter"
            )
    critics = [critic(streams) for streams in cfg.streams_of_critics(constrained)]
    actor = engine.Engine(PolicyOnSharedBase(shared_base, "actor"), cfg.optim, cfg.engine, steps)
    reference = engine.Frozen(PolicyOnSharedBase(shared_base, None), cfg.engine)
    return Roles(tokenizer, [], actor, reference, scorers, critics)


def engines_of(roles: Roles) -> dict[str, engine.Engine]:
    """The engines of the trained models, by the names that checkpoints give them.

    The names are actor, reward_critic and cost_critic; cost_critic-<name> for each of several constraints;
    critic where one critic has all streams.
    """

    def name_of(critic: Critic) -> str:
        if len(critic.names) > 1:
            return "critic"
        return per_stream("critic", critic.names[0], roles.constraints).replace("/", "-")

    return {"actor": roles.trained_actor, **{name_of(critic): critic.engine for critic in roles.critics}}


def export_metadata_writers(
    roles: Roles, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Callable[[Path], None]]:
    """Returns the functions that complete an export of a trained model.

    Args:
        roles: The trained models.
        tokenizer: The actor's tokenizer.

    Returns:
        {name as in `engines_of`: function that writes config and tokenizer into a folder}.
    """
    return {
        name: export_metadata_writer(model.module, tokenizer) for name, model in engines_of(roles).items()
    }
