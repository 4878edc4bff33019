"""The moments of ppo, ppo-lag and evaluate: rollout, scoring, update; separate models, or adapters on one
base.
"""

from ...config.sections import Lora
from ...models import multi_adapter
from ...models.sampling_distribution import plain
from ...rollout.engines import engine_name
from . import pass_memory, sizes
from .pass_memory import lengths_of
from .passes import passes_of_step
from .phases import (
    ANY,
    Phase,
    add,
    asking,
    backward,
    forward,
    loading,
    resident_gradients,
    saved_activations,
    stepping,
    worst,
)

PICKING = 3 * 4  # bytes of float32 copies of a row's logits while its token is picked
SORTING = 4 + 8 + 8  # and while a nucleus is cut: values, places, float64 sums


def ppo(roles):
    """Moments of policy optimisation."""
    cfg = roles.cfg
    reference, judges, actor, critics = (_on_shared_base if cfg.lora.rank else _separate)(roles)
    lengths = lengths_of(cfg.pass_tokens(), cfg.max_length)
    asked = cfg.sampling.max_new_tokens or ANY
    several = passes_of_step(roles).several
    if cfg.ppo.overlap and cfg.sampling.engine != "vllm-server":
        roles.add("copy of the actor", "model", "policy")
    before = [
        *rollout(roles, actor, cfg.ppo.batch_size),
        _scoring(roles, reference, judges, actor, critics, lengths, asked),
    ]
    after = [*_updating(roles, actor, critics, lengths, asked, several), stepping(roles)]
    return [
        loading(roles),
        *before,
        *after,
        *([_overlapping(roles, before, after)] if cfg.ppo.overlap else []),
    ]


def _overlapping(roles, before, after):
    """The next batch is sampled and scored while this one is learned from."""
    resident = roles.resident()
    first, second = (max(moments, key=lambda moment: moment.total).parts for moments in (before, after))
    return Phase("both at once", {name: first[name] + second[name] - resident[name] for name in resident})


def _separate(roles):
    """Six models, each with all of its weights -> reference, judges, actor, critics."""
    cfg = roles.cfg
    saving = {"checkpointing": cfg.gradient_checkpointing}
    reference = roles.add("reference", "model", "policy")
    judges = _scorers(roles)
    actor = roles.add("actor", "model", "policy", cfg.optim, **saving)
    critics = []
    for role, (name, *_) in _critics(roles):
        setting, path = cfg.critic_settings()[name]
        start = cfg.scorer_settings()[name] if path is None else setting
        critics.append(roles.add(role, start, "score", cfg.critic_optim, **saving))
    return reference, judges, actor, critics


def _scorers(roles):
    """Adds the model of each scorer, whole."""
    return [
        roles.add(f"{name} model", setting, "score") for name, setting in roles.cfg.scorer_settings().items()
    ]


def _critics(roles):
    """[(role, names of what it predicts)] of the critics of a stage."""
    return [
        ("critic" if len(names) > 1 else f"{names[0]} critic", names)
        for names in roles.cfg.streams_of_critics(roles.kind == "ppo-lag")
    ]


def _on_shared_base(roles):
    """One frozen base; what is trained are adapters on it -> reference, judges, actor, critics."""
    cfg = roles.cfg
    saving = {"checkpointing": cfg.gradient_checkpointing}
    roles.add("base", "model", "policy")
    judges = []
    for name, setting in cfg.scorer_settings().items():
        lora = _saved_adapter(roles, cfg.scorers()[name].path)
        judges.append(
            roles.add(f"{name} model", setting, "score")
            if lora is None
            else roles.add(f"{name} model", "model", "score", lora=lora, shared=True)
        )
    critics = [
        roles.add(role, "model", "score", cfg.critic_optim, cfg.lora, shared=True, **saving)
        for role, _ in _critics(roles)
    ]
    actor = roles.add("actor", "model", "policy", cfg.optim, cfg.lora, shared=True, **saving)
    return roles.add("reference", "model", "policy", shared=True), judges, actor, critics


def _saved_adapter(roles, path):
    """The Lora config of a score model that will be an adapter of this base; None for a whole model beside
    it.
    """
    base = roles.cfg.model
    saved = multi_adapter.config_of_score(path, base)
    if saved is not None:
        targets = saved.target_modules
        return Lora(rank=saved.r, target_modules=targets if isinstance(targets, str) else sorted(targets))
    made = sizes.made_by(path, roles.earlier)
    maker = roles.earlier.get(made)
    return maker.lora if maker is not None and maker.lora.rank and maker.model == base else None


def _shape(sampling):
    """What the scored distribution is shaped by, besides its temperature; () for nothing."""
    return () if plain(sampling) else (sampling.top_p, sampling.top_k, sampling.repetition_penalty)


# ---------------------------------------------------------------- scoring and update


def _scoring(roles, reference, judges, actor, critics, lengths, asked):
    shape = _shape(roles.cfg.sampling)
    turns = [
        asking(roles, reference, lengths, asked, shape),
        *(asking(roles, judge, lengths, "end") for judge in judges),
    ]
    if not roles.cfg.in_one_pass():
        turns += [
            asking(roles, actor, lengths, asked, shape),
            *(asking(roles, c, lengths, asked) for c in critics),
        ]
    return worst("scoring", [add(roles.resident(), turn) for turn in turns])


def _updating(roles, actor, critics, lengths, asked, several):
    """The update's passes and, where there is supervised data, those over it."""
    cfg = roles.cfg
    together = cfg.in_one_pass()
    # The head makes its gradients in the forward, whether by linear_ppo_loss or by on_policy_loss.
    of_actor = {"objective": True, "shape": _shape(cfg.sampling)}
    made = {
        model.role: roles.footprint(
            model,
            lengths,
            asked,
            keep_gradients=not several and model.states.whole,
            **(of_actor if model is actor else {}),
        )
        for model in (actor, *critics)
    }
    before, turns, graphs = add(roles.resident(), resident_gradients([actor, *critics], not several)), [], []
    for model in (*critics, actor) if together else ():
        turns.append(add(before, *graphs, forward(model, made[model.role])))
        graphs.append(saved_activations(model, made[model.role]))
    done = []
    for model in (actor, *critics):
        others = (
            [saved_activations(m, made[m.role]) for m in (*critics, actor) if m not in (*done, model)]
            if together
            else []
        )
        earlier = {} if several else {"gradients": sum(m.states.gradients for m in done if m.states.whole)}
        turns.append(add(before, earlier, *others, forward(model, made[model.role]) if not together else {}))
        turns += [add(before, earlier, *others, turn) for turn in backward(model, made[model.role])]
        done.append(model)
    moments = [worst("update", turns)]
    if cfg.trains_on_ptx():
        trained = roles.footprint(actor, lengths, ANY)
        before = add(roles.resident(), resident_gradients([actor, *critics]))
        turns = [forward(actor, trained), *backward(actor, trained)]
        moments.append(worst("supervised loss", [add(before, turn) for turn in turns]))
    return moments


# ---------------------------------------------------------------- generation


def rollout(roles, actor, prompts):
    """Moments of generation: over the prompts, and at its end, when the cache is full; [] on another machine."""
    cfg, sampling = roles.cfg, roles.cfg.sampling
    name = engine_name(sampling, sizes.build(actor.blueprint).lm, roles.device, actor.states.sharded)
    if name == "vllm-server":
        return []
    before = roles.resident()
    if actor.states.sharded:
        whole = roles.width * actor.count.all
        before = add(
            before, {"buffers": whole if sampling.gather else actor.states.gathered + actor.states.fetching}
        )
    if name == "vllm":
        return [
            Phase("rollout", add(before, {"cache": int(sampling.memory_share(name) * roles.hardware.memory)}))
        ]
    rows = prompts * sampling.num_return_sequences
    rows = min(rows, sampling.batch_size or rows)
    first = sampling.prompt_limit(cfg.max_length)
    longest = first + sampling.response_limit(first, cfg.max_length)
    cache = rows * sizes.cache_bytes(actor.blueprint, longest)
    if name == "continuous":
        # A paged cache takes a share of what is free where all rows do not fit at once; some then wait. One
        # must fit.
        free = max(0, roles.hardware.memory - sum(before.values()))
        cache = min(cache, max(cache // rows, int(sampling.memory_share(name) * free)))
        roles.note(actor, cache=cache)
        return [Phase("rollout", add(before, {"cache": cache}))]
    roles.note(actor, cache=cache)
    vocabulary = sizes.build(actor.blueprint).lm.get_input_embeddings().weight.shape[0]
    logits = rows * vocabulary * (PICKING + (SORTING if _shape(sampling) else 0))
    start, end = pass_memory.of_generation(actor.blueprint, rows, first, longest, roles.device)
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


def evaluate(roles):
    """Moments of the stage evaluate: nothing is trained."""
    cfg = roles.cfg
    actor = roles.add("policy", "model", "policy")
    asked = [(model, "end", ()) for model in _scorers(roles)]
    shape = _shape(cfg.sampling)
    if cfg.reference:
        asked.append((roles.add("reference", "reference", "policy"), ANY, shape))
    lengths = lengths_of(cfg.pass_tokens(), cfg.max_length)
    turns = [asking(roles, model, lengths, *rest) for model, *rest in [(actor, ANY, shape), *asked]]
    return [
        loading(roles),
        *rollout(roles, actor, cfg.batch_size),
        worst("scoring", [add(roles.resident(), turn) for turn in turns]),
    ]
