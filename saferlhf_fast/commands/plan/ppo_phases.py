"""The phases of ppo, ppo-lag and evaluate: rollout, scoring, update.

Models are separate, or adapters on one shared base.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...config.sections import Lora
from ...models import multi_adapter
from ...models.sampling_distribution import plain
from ...rollout.engines import engine_name
from . import pass_memory, sizes
from .pass_memory import lengths_of
from .passes import passes_of_step
from .phases import (
    ANY,
    Model,
    Parts,
    Phase,
    StageModels,
    add,
    backward,
    forward,
    loading,
    resident_gradients,
    saved_activations,
    scoring_pass,
    stepping,
    worst,
)

if TYPE_CHECKING:
    from ...config.sections import Sampling
    from ...config.stages import EvaluateConfig, PPOConfig

PICKING = 3 * 4  # bytes of float32 copies of a row's logits while its token is picked
SORTING = 4 + 8 + 8  # the same while a nucleus is cut: values, places, float64 sums


class _PPOModels(NamedTuple):
    """The models of policy optimisation."""

    reference: Model
    scorers: list[Model]
    actor: Model
    critics: list[Model]

    @property
    def trained(self) -> list[Model]:
        return [self.actor, *self.critics]


class _Pass(NamedTuple):
    """A pass over rollouts: tokens of each sequence, and how many of them at its end are predicted."""

    lengths: tuple[int, ...]
    predicted: int


def ppo(stage: "StageModels[PPOConfig]") -> list[Phase]:
    """Returns the phases of the stages ppo and ppo-lag."""
    cfg = stage.cfg
    models = (_on_shared_base if cfg.lora.rank else _separate)(stage)
    size = _Pass(lengths_of(cfg.pass_tokens(), cfg.max_length), cfg.sampling.max_new_tokens or ANY)
    several = passes_of_step(stage).several
    if cfg.ppo.overlap and cfg.sampling.engine != "vllm-server":
        stage.add("copy of the actor", "model", "policy")
    before = [*rollout(stage, models.actor, cfg.ppo.batch_size), _scoring(stage, models, size)]
    after = [*_updating(stage, models, size, several), stepping(stage)]
    return [
        loading(stage),
        *before,
        *after,
        *([_overlapping(stage, before, after)] if cfg.ppo.overlap else []),
    ]


def _overlapping(stage: "StageModels[PPOConfig]", before: Sequence[Phase], after: Sequence[Phase]) -> Phase:
    """Returns the phase in which the next batch is sampled and scored while this one is learned from."""
    resident = stage.resident()
    first, second = (max(phases, key=lambda phase: phase.total).parts for phases in (before, after))
    return Phase("both at once", {name: first[name] + second[name] - resident[name] for name in resident})


def _separate(stage: "StageModels[PPOConfig]") -> _PPOModels:
    """Adds the models of a stage, each with all of its weights."""
    cfg = stage.cfg
    reference = stage.add("reference", "model", "policy")
    scorers = _scorers(stage)
    actor = stage.add("actor", "model", "policy", cfg.optim, checkpointing=cfg.gradient_checkpointing)
    critics = []
    for role, (name, *_) in _critics(stage):
        setting, path = cfg.critic_settings()[name]
        start = setting
        if path is None:  # an encoder predicts nothing before its tokens: its critic starts from the actor
            scorer = scorers[list(cfg.scorer_settings()).index(name)]
            start = "model" if sizes.of_encoder(scorer.blueprint) else cfg.scorer_settings()[name]
        critics.append(
            stage.add(role, start, "score", cfg.critic_optim, checkpointing=cfg.gradient_checkpointing)
        )
    return _PPOModels(reference, scorers, actor, critics)


def _scorers(stage: "StageModels[PPOConfig | EvaluateConfig]") -> list[Model]:
    """Adds the model of each scorer, with all of its weights."""
    return [
        stage.add(f"{name} model", setting, "score") for name, setting in stage.cfg.scorer_settings().items()
    ]


def _critics(stage: "StageModels[PPOConfig]") -> list[tuple[str, Sequence[str]]]:
    """Returns (role, names of what it predicts) of each critic of a stage."""
    return [
        ("critic" if len(names) > 1 else f"{names[0]} critic", names)
        for names in stage.cfg.streams_of_critics(stage.kind == "ppo-lag")
    ]


def _on_shared_base(stage: "StageModels[PPOConfig]") -> _PPOModels:
    """Adds one frozen base, and the adapters on it that are trained."""
    cfg = stage.cfg
    stage.add("base", "model", "policy")
    scorers = []
    for name, setting in cfg.scorer_settings().items():
        lora = _saved_adapter(stage, cfg.scorers()[name].path)
        scorers.append(
            stage.add(f"{name} model", setting, "score")
            if lora is None
            else stage.add(f"{name} model", "model", "score", lora=lora, shared=True)
        )
    checkpointing = cfg.gradient_checkpointing
    critics = [
        stage.add(role, "model", "score", cfg.critic_optim, cfg.lora, checkpointing, shared=True)
        for role, _ in _critics(stage)
    ]
    actor = stage.add("actor", "model", "policy", cfg.optim, cfg.lora, checkpointing, shared=True)
    return _PPOModels(stage.add("reference", "model", "policy", shared=True), scorers, actor, critics)


def _saved_adapter(stage: "StageModels[PPOConfig]", path: str) -> Lora | None:
    """Returns the Lora config of a score model that is an adapter of this stage's base.

    None for a score model with all of its weights, which is then a model of its own.
    """
    base = stage.cfg.model
    saved = multi_adapter.config_of_score(path, base)
    if saved is not None:
        targets = saved.target_modules
        return Lora(rank=saved.r, target_modules=targets if isinstance(targets, str) else sorted(targets))
    output = sizes.earlier_output(path, stage.earlier)
    producer = None if output is None else stage.earlier.get(output)
    return producer.lora if producer is not None and producer.lora.rank and producer.model == base else None


def _shape(sampling: "Sampling") -> pass_memory.Shape:
    """Returns what shapes the scored distribution besides its temperature; () for nothing."""
    return () if plain(sampling) else (sampling.top_p, sampling.top_k, sampling.repetition_penalty)


# ---------------------------------------------------------------- scoring and update


def _scoring(stage: "StageModels[PPOConfig]", models: _PPOModels, size: _Pass) -> Phase:
    """Returns the phase in which rollouts are scored."""
    shape = _shape(stage.cfg.sampling)
    turns = [
        scoring_pass(stage, models.reference, *size, shape),
        *(scoring_pass(stage, scorer, size.lengths, "end") for scorer in models.scorers),
    ]
    if not stage.cfg.in_one_pass():
        turns += [
            scoring_pass(stage, models.actor, *size, shape),
            *(scoring_pass(stage, critic, *size) for critic in models.critics),
        ]
    return worst("scoring", [add(stage.resident(), turn) for turn in turns])


def _updating(stage: "StageModels[PPOConfig]", models: _PPOModels, size: _Pass, several: bool) -> list[Phase]:
    """Returns the phase of the update's passes and, where there is supervised data, that of its passes.

    several: whether an optimiser step has more than one pass.
    """
    cfg, actor = stage.cfg, models.actor
    together = cfg.in_one_pass()
    footprints = {
        model.role: stage.footprint(
            model,
            size.lengths,
            size.predicted,
            keep_gradients=not several and model.states.unpartitioned_gradients,
            # The head computes its gradients in the forward, by linear_ppo_loss or by on_policy_loss.
            objective=model is actor,
            shape=_shape(cfg.sampling) if model is actor else (),
        )
        for model in models.trained
    }
    before = add(stage.resident(), resident_gradients(models.trained, not several))
    turns: list[Parts] = []
    graphs: list[Parts] = []
    for model in (*models.critics, actor) if together else ():
        turns.append(add(before, *graphs, forward(model, footprints[model.role])))
        graphs.append(saved_activations(model, footprints[model.role]))
    done: list[Model] = []
    for model in models.trained:
        others = (
            [
                saved_activations(other, footprints[other.role])
                for other in (*models.critics, actor)
                if other not in (*done, model)
            ]
            if together
            else []
        )
        earlier = (
            {}
            if several
            else {"gradients": sum(m.states.gradients for m in done if m.states.unpartitioned_gradients)}
        )
        alone = {} if together else forward(model, footprints[model.role])
        turns.append(add(before, earlier, *others, alone))
        turns += [add(before, earlier, *others, turn) for turn in backward(model, footprints[model.role])]
        done.append(model)
    phases = [worst("update", turns)]
    if cfg.trains_on_ptx():
        supervised = stage.footprint(actor, size.lengths, ANY)
        before = add(stage.resident(), resident_gradients(models.trained))
        passes = [forward(actor, supervised), *backward(actor, supervised)]
        phases.append(worst("supervised loss", [add(before, turn) for turn in passes]))
    return phases


# ---------------------------------------------------------------- generation


def rollout(
    stage: "StageModels[PPOConfig] | StageModels[EvaluateConfig]", actor: Model, prompts: int
) -> list[Phase]:
    """Returns the phase of generation: over the prompts, and at its end, when the cache is full.

    Args:
        stage: The stage.
        actor: The model that generates.
        prompts: Prompts of a batch on each device.

    Returns:
        One phase; none when a server on another machine generates.
    """
    cfg, sampling = stage.cfg, stage.cfg.sampling
    engine = engine_name(sampling, sizes.build(actor.blueprint).lm, stage.device, actor.states.sharded)
    if engine == "vllm-server":
        return []
    before = stage.resident()
    if actor.states.sharded:
        all_weights = stage.width * actor.count.all
        by_layer = actor.states.gathered + actor.states.fetching
        before = add(before, {"buffers": all_weights if sampling.gather else by_layer})
    if engine == "vllm":
        cache = int(sampling.memory_share(engine) * stage.hardware.memory)
        return [Phase("rollout", add(before, {"cache": cache}))]
    rows = prompts * sampling.num_return_sequences
    rows = min(rows, sampling.batch_size or rows)
    first = sampling.prompt_limit(cfg.max_length)
    longest = first + sampling.response_limit(first, cfg.max_length)
    cache = rows * sizes.cache_bytes(actor.blueprint, longest)
    if engine == "continuous":
        # A paged cache takes a share of what is free when all rows do not fit at once; some then wait. One
        # row must fit.
        free = max(0, stage.hardware.memory - sum(before.values()))
        cache = min(cache, max(cache // rows, int(sampling.memory_share(engine) * free)))
        stage.note(actor, cache=cache)
        return [Phase("rollout", add(before, {"cache": cache}))]
    stage.note(actor, cache=cache)
    vocabulary = sizes.build(actor.blueprint).lm.get_input_embeddings().weight.shape[0]
    logits = rows * vocabulary * (PICKING + (SORTING if _shape(sampling) else 0))
    start, end = pass_memory.footprints_of_generation(actor.blueprint, rows, first, longest, stage.device)
    filled = rows * sizes.cache_bytes(actor.blueprint, first)
    return [
        worst(
            "rollout",
            [
                add(before, {"cache": filled, "activations": max(0, start.forward - filled)}),
                add(before, {"cache": cache, "activations": max(0, end.forward - cache), "logits": logits}),
            ],
        )
    ]


def evaluate(stage: "StageModels[EvaluateConfig]") -> list[Phase]:
    """Returns the phases of the stage evaluate, which trains nothing."""
    cfg = stage.cfg
    actor = stage.add("policy", "model", "policy")
    scorers = _scorers(stage)
    reference = stage.add("reference", "reference", "policy") if cfg.reference else None
    shape = _shape(cfg.sampling)
    lengths = lengths_of(cfg.pass_tokens(), cfg.max_length)
    turns = [
        scoring_pass(stage, actor, lengths, ANY, shape),
        *(scoring_pass(stage, model, lengths, "end") for model in scorers),
    ]
    if reference is not None:
        turns.append(scoring_pass(stage, reference, lengths, ANY, shape))
    return [
        loading(stage),
        *rollout(stage, actor, cfg.batch_size),
        worst("scoring", [add(stage.resident(), turn) for turn in turns]),
    ]
