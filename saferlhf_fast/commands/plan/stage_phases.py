"""Who takes part in a stage, and how much memory it takes at each of its moments: the order of calls of training/sft.py,
preference.py, dpo.py, ppo/load_roles.py and ppo/update.py and of rollout/scoring.py, in bytes. ppo_phases.py has ppo, ppo-lag and
evaluate.
"""

import dataclasses
from importlib import import_module

from . import communication
from .pass_memory import lengths_of
from .passes import longest_pass, passes_of_step
from .phases import ANY, Cast, add, alive, asking, backward, forward, held, loading, stepping, worst


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage needs."""

    name: str
    kind: str
    models: list                         # Model
    use: dict                            # role -> {"activations": bytes, "logits": bytes, "cache": bytes}, at their worst
    moments: list                        # Moment
    host: int                            # bytes of host memory per process: what is offloaded
    sent: list = dataclasses.field(default_factory=list)      # communication.Sent of one step

    @property
    def worst(self):
        """The largest moment."""
        return max(self.moments, key=lambda moment: moment.total)


def plan_stage(name, kind, cfg, hardware, earlier):
    """-> StagePlan. earlier: {output folder: its config} of the stages before it in the same recipe."""
    cast = Cast(name, kind, cfg, hardware, earlier)
    moments = moments_of(cast)
    return StagePlan(name, kind, cast.models, cast.use, moments, sum(model.states.host for model in cast.models),
                     communication.of_stage(cast))


def moments_of(cast):
    """Makes a stage's models -> its Moments."""
    module, name = cast.spec.planner.split(":")
    return getattr(import_module(f"{__package__}.{module}"), name)(cast)


# ---------------------------------------------------------------- supervised stages


def _supervised(cast, kind, asked, reference=False):
    cfg = cast.cfg
    if reference:
        frozen = cast.add("reference", "model", "policy")
    model = cast.add("score model" if kind == "score" else "policy", "model", kind, cfg.optim, cfg.lora,
                     cfg.train.gradient_checkpointing)
    lengths, several = lengths_of(longest_pass(cast), cfg.train.max_length), passes_of_step(cast).several
    made = cast.footprint(model, lengths, asked, keep_gradients=not several and model.states.whole)
    before = add(cast.resident(), held([model], not several))
    turns = [add(before, forward(model, made)), *(add(before, turn) for turn in backward(model, made))]
    if reference:
        turns.append(add(before, alive(model, made), asking(cast, frozen, lengths, asked)))
    return [loading(cast), worst("passes", turns), stepping(cast)]


def sft(cast):
    return _supervised(cast, "policy", ANY)


def preference(cast):
    return _supervised(cast, "score", "all" if cast.cfg.loss == "token" else "end")


def dpo(cast):
    return _supervised(cast, "policy", ANY, reference=True)
