"""The moments of ppo, ppo-lag and evaluate: rollout, scoring, update; separate models, or adapters on one base."""

from ...config.sections import Lora
from ...models import multi_adapter
from ...models.sampling_distribution import plain
from ...rollout.engines import engine_name
from . import pass_memory, sizes
from .pass_memory import lengths_of
from .passes import passes_of_step
from .phases import ANY, Moment, add, alive, asking, backward, forward, held, loading, stepping, worst

PICKING = 3 * 4      # bytes of float32 copies of a row's logits while its token is picked
SORTING = 4 + 8 + 8  # and while a nucleus is cut: values, places, float64 sums


def ppo(cast):
    """Moments of policy optimisation."""
    cfg = cast.cfg
    reference, judges, actor, critics = (_on_trunk if cfg.lora.rank else _separate)(cast)
    lengths = lengths_of(cfg.pass_tokens(), cfg.max_length)
    asked = cfg.sampling.max_new_tokens or ANY
    several = passes_of_step(cast).several
    if cfg.ppo.overlap and cfg.sampling.engine != "vllm-server":
        cast.add("copy of the actor", "model", "policy")
    before = [*rollout(cast, actor, cfg.ppo.batch_size), _scoring(cast, reference, judges, actor, critics, lengths, asked)]
    after = [*_updating(cast, actor, critics, lengths, asked, several), stepping(cast)]
    return [loading(cast), *before, *after, *([_overlapping(cast, before, after)] if cfg.ppo.overlap else [])]


def _overlapping(cast, before, after):
    """The next batch is sampled and scored while this one is learned from."""
    resident = cast.resident()
    first, second = (max(moments, key=lambda moment: moment.total).parts for moments in (before, after))
    return Moment("both at once", {name: first[name] + second[name] - resident[name] for name in resident})


def _separate(cast):
    """Six models, each with all of its weights -> reference, judges, actor, critics."""
    cfg = cast.cfg
    saving = {"checkpointing": cfg.gradient_checkpointing}
    reference = cast.add("reference", "model", "policy")
    judges = _scorers(cast)
    actor = cast.add("actor", "model", "policy", cfg.optim, **saving)
    critics = []
    for role, (name, *_) in _critics(cast):
        setting, path = cfg.critic_settings()[name]
        start = cfg.scorer_settings()[name] if path is None else setting
        critics.append(cast.add(role, start, "score", cfg.critic_optim, **saving))
    return reference, judges, actor, critics


def _scorers(cast):
    """Adds the model of each scorer, whole."""
    return [cast.add(f"{name} model", setting, "score") for name, setting in cast.cfg.scorer_settings().items()]


def _critics(cast):
    """[(role, names of what it predicts)] of the critics of a stage."""
    return [("critic" if len(names) > 1 else f"{names[0]} critic", names)
            for names in cast.cfg.streams_of_critics(cast.kind == "ppo-lag")]


def _on_trunk(cast):
    """One frozen base; what is trained are adapters on it -> reference, judges, actor, critics."""
    cfg = cast.cfg
    saving = {"checkpointing": cfg.gradient_checkpointing}
    cast.add("base", "model", "policy")
    judges = []
    for name, setting in cfg.scorer_settings().items():
        lora = _saved_adapter(cast, cfg.scorers()[name].path)
        judges.append(cast.add(f"{name} model", setting, "score") if lora is None else
                      cast.add(f"{name} model", "model", "score", lora=lora, shared=True))
    critics = [cast.add(role, "model", "score", cfg.critic_optim, cfg.lora, shared=True, **saving) for role, _ in _critics(cast)]
    actor = cast.add("actor", "model", "policy", cfg.optim, cfg.lora, shared=True, **saving)
    return cast.add("reference", "model", "policy", shared=True), judges, actor, critics


def _saved_adapter(cast, path):
    """The Lora config of a score model that will be an adapter of this base; None for a whole model beside it."""
    base = cast.cfg.model
    saved = multi_adapter.config_of_score(path, base)
    if saved is not None:
        targets = saved.target_modules
        return Lora(rank=saved.r, target_modules=targets if isinstance(targets, str) else sorted(targets))
    made = sizes.made_by(path, cast.earlier)
    maker = cast.earlier.get(made)
    return maker.lora if maker is not None and maker.lora.rank and maker.model == base else None


def _shape(sampling):
    """What the scored distribution is shaped by, besides its temperature; () for nothing."""
    return () if plain(sampling) else (sampling.top_p, sampling.top_k, sampling.repetition_penalty)


# ---------------------------------------------------------------- scoring and update


def _scoring(cast, reference, judges, actor, critics, lengths, asked):
    shape = _shape(cast.cfg.sampling)
    turns = [asking(cast, reference, lengths, asked, shape), *(asking(cast, judge, lengths, "end") for judge in judges)]
    if not cast.cfg.in_one_pass():
        turns += [asking(cast, actor, lengths, asked, shape), *(asking(cast, c, lengths, asked) for c in critics)]
    return worst("scoring", [add(cast.resident(), turn) for turn in turns])


def _updating(cast, actor, critics, lengths, asked, several):
    """The update's passes and, where there is supervised data, those over it."""
    cfg = cast.cfg
    together = cfg.in_one_pass()
    # The head makes its gradients in the forward, whether by linear_ppo_loss or by on_policy_loss.
    of_actor = {"objective": True, "shape": _shape(cfg.sampling)}
    made = {model.role: cast.footprint(model, lengths, asked, keep_gradients=not several and model.states.whole,
                                       **(of_actor if model is actor else {})) for model in (actor, *critics)}
    before, turns, graphs = add(cast.resident(), held([actor, *critics], not several)), [], []
    for model in (*critics, actor) if together else ():
        turns.append(add(before, *graphs, forward(model, made[model.role])))
        graphs.append(alive(model, made[model.role]))
    done = []
    for model in (actor, *critics):
        others = [alive(m, made[m.role]) for m in (*critics, actor) if m not in (*done, model)] if together else []
        earlier = {} if several else {"gradients": sum(m.states.gradients for m in done if m.states.whole)}
        turns.append(add(before, earlier, *others, forward(model, made[model.role]) if not together else {}))
        turns += [add(before, earlier, *others, turn) for turn in backward(model, made[model.role])]
        done.append(model)
    moments = [worst("update", turns)]
    if cfg.trains_on_ptx():
        trained = cast.footprint(actor, lengths, ANY)
        before = add(cast.resident(), held([actor, *critics]))
        turns = [forward(actor, trained), *backward(actor, trained)]
        moments.append(worst("supervised loss", [add(before, turn) for turn in turns]))
    return moments


# ---------------------------------------------------------------- generation


def rollout(cast, actor, prompts):
    """Moments of generation: over the prompts, and at its end, when the cache is full; [] on another machine."""
    cfg, sampling = cast.cfg, cast.cfg.sampling
    name = engine_name(sampling, sizes.build(actor.blueprint).lm, cast.device, actor.states.sharded)
    if name == "vllm-server":
        return []
    before = cast.resident()
    if actor.states.sharded:
        whole = cast.width * actor.count.all
        before = add(before, {"buffers": whole if sampling.gather else actor.states.gathered + actor.states.fetching})
    if name == "vllm":
        return [Moment("rollout", add(before, {"cache": int(sampling.memory_share(name) * cast.hardware.memory)}))]
    rows = prompts * sampling.num_return_sequences
    rows = min(rows, sampling.batch_size or rows)
    first = sampling.prompt_limit(cfg.max_length)
    longest = first + sampling.response_limit(first, cfg.max_length)
    cache = rows * sizes.cache_bytes(actor.blueprint, longest)
    if name == "continuous":
        # A paged cache takes a share of what is free where all rows do not fit at once; some then wait. One must fit.
        free = max(0, cast.hardware.memory - sum(before.values()))
        cache = min(cache, max(cache // rows, int(sampling.memory_share(name) * free)))
        cast.note(actor, cache=cache)
        return [Moment("rollout", add(before, {"cache": cache}))]
    cast.note(actor, cache=cache)
    vocabulary = sizes.build(actor.blueprint).lm.get_input_embeddings().weight.shape[0]
    logits = rows * vocabulary * (PICKING + (SORTING if _shape(sampling) else 0))
    start, end = pass_memory.of_generation(actor.blueprint, rows, first, longest, cast.device)
    filled = rows * sizes.cache_bytes(actor.blueprint, first)
    return [worst("rollout", [add(before, {"cache": filled, "activations": max(0, start.forward - filled)}),
                              add(before, {"cache": cache, "activations": max(0, end.forward - cache), "logits": logits})])]


def evaluate(cast):
    """Moments of the stage evaluate: nothing is trained."""
    cfg = cast.cfg
    actor = cast.add("policy", "model", "policy")
    asked = [(model, "end", ()) for model in _scorers(cast)]
    shape = _shape(cfg.sampling)
    if cfg.reference:
        asked.append((cast.add("reference", "reference", "policy"), ANY, shape))
    lengths = lengths_of(cfg.pass_tokens(), cfg.max_length)
    turns = [asking(cast, model, lengths, *rest) for model, *rest in [(actor, ANY, shape), *asked]]
    return [loading(cast), *rollout(cast, actor, cfg.batch_size),
            worst("scoring", [add(cast.resident(), turn) for turn in turns])]
