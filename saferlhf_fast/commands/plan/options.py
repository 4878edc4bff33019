"""What makes a stage fit that does not: settings tried one after the other, those that cost least first.

Each option is the words to type. `alone` is the stage's peak with nothing else changed, `together` with what
stands above it, as far as it helped; at the end what is not needed is taken back out.
"""

import dataclasses
import functools
from typing import NamedTuple

from ...config.checks import check_settings
from ...config.sections import Optimizer
from ...config.stage_table import FAMILIES, STAGE_SPECS
from ...errors import UserError
from .stage_phases import plan_stage

WORTH = 0.98  # an option that leaves more of the peak than this is no help
LORA_RANK = 16


class Choice(NamedTuple):
    """A setting to try."""

    key: str
    value: object
    cost: str
    also: str = ""  # another key that gets the same value

    def words(self, stage=None):
        """As it is typed, for a stage of a recipe or alone."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return " ".join(
            f"{stage + '.' if stage else ''}{key}={value}" for key in (self.key, self.also) if key
        )


class Option(NamedTuple):
    """A choice that was tried, and what came of it (bytes)."""

    choice: Choice
    alone: int | None  # None: it cannot stand alone
    together: int
    fits: bool


class Advice(NamedTuple):
    """What was tried; the choices that are enough, none when nothing was."""

    tried: list
    enough: list
    peak: int


def changed(cfg, key, value):
    """A config with one dotted key replaced."""
    first, _, rest = key.partition(".")
    return dataclasses.replace(cfg, **{first: changed(getattr(cfg, first), rest, value) if rest else value})


def setting(cfg, key):
    """The value of one dotted key."""
    return functools.reduce(getattr, key.split("."), cfg)


def advise(name, kind, cfg, hardware, earlier, usable):
    """-> Advice for a stage whose peak is above `usable` bytes."""

    def after(chosen):
        new = cfg
        for choice in chosen:
            for key in (choice.key, choice.also):
                new = changed(new, key, choice.value) if key else new
        return new

    @functools.cache
    def peak(chosen):
        """Bytes, or None where the settings do not go together."""
        new = after(chosen)
        return plan_stage(name, kind, new, hardware, earlier).worst.total if _possible(kind, new) else None

    kept, tried = (), []
    for choice in choices(kind, cfg, hardware):
        new = (*(k for k in kept if k.key != choice.key), choice)
        together = peak(new)
        if together is None or together > WORTH * peak(kept):
            continue
        kept = new
        tried.append(Option(choice, peak((choice,)), together, together <= usable))
        if together <= usable:
            break
    if peak(kept) > usable:
        return Advice(tried, [], peak(kept))
    kept = _relaxed(
        kept,
        [option.choice for option in tried],
        lambda chosen: peak(chosen) is not None and peak(chosen) <= usable,
    )
    return Advice(tried, list(kept), peak(kept))


def _relaxed(kept, tried, fits):
    """Without what is not needed after all, and with milder values (those tried before) of what is."""
    for choice in kept:
        milder = [other for other in tried[: tried.index(choice)] if other.key == choice.key]
        for other in (None, *milder):
            new = tuple(other if k is choice else k for k in kept if k is not choice or other is not None)
            if fits(new):
                kept = new
                break
    return kept


def _possible(kind, cfg):
    """Whether settings go together, as the stage itself would find."""
    try:
        check_settings(kind, cfg)
    except UserError:
        return False
    return True


def choices(kind, cfg, hardware):
    """Yields what a recipe of this kind of stage can change, those that cost least first."""
    family, ppo, optimizers = (
        FAMILIES[STAGE_SPECS[kind].family],
        STAGE_SPECS[kind].family == "ppo",
        cfg.groups(Optimizer),
    )
    yield from _shorter_passes(cfg, family)
    if ppo:
        yield from _fewer_rows(cfg)
    if cfg.engine.precision == "fp32" and hardware.device == "cuda":
        yield Choice("engine.precision", "bf16", "rounding to 8 bits in forward and backward")
    if optimizers and hardware.gpus > 1:
        yield from _sharding(cfg, (1, 2))
    if family.recomputation and not setting(cfg, family.recomputation):
        yield Choice(family.recomputation, True, "a third more time in passes")
    if ppo and cfg.ppo.overlap:
        yield Choice("ppo.overlap", False, "rollout and update take turns")
    if ppo and cfg.ppo.single_pass:
        yield Choice("ppo.single_pass", False, "a forward pass more of each trained model")
    if hardware.gpus > 1:
        yield from _sharding(cfg, (3,))
    if optimizers and cfg.optim.kind == "adamw":
        first, *second = (f"{key}.kind" for key in optimizers)
        yield Choice(first, "adamw-8bit", "moments in 8 bits", *second)
    if optimizers and not cfg.engine.offload_optimizer:
        if cfg.engine.zero_stage == 0 and hardware.gpus == 1:
            yield from _sharding(cfg, (2,))
        yield Choice("engine.offload_optimizer", True, "the step runs on the CPU")
    if ppo and cfg.long_form() and not cfg.ppo.shared_critic and cfg.lora.rank == 0:
        yield Choice("ppo.shared_critic", True, "one critic with two heads")
    if optimizers and cfg.lora.rank == 0:
        yield Choice("lora.rank", LORA_RANK, f"adapters alone are trained{', on one base' if ppo else ''}")
    if not cfg.engine.offload_parameters and hardware.gpus > 1:
        yield Choice("engine.offload_parameters", True, "weights cross the bus in every pass")


def _sharding(cfg, stages):
    costs = {
        1: "optimiser states gathered once a step",
        2: "gradients reduced in every pass",
        3: "weights gathered in every pass",
    }
    for stage in stages:
        if stage > cfg.engine.zero_stage:
            yield Choice("engine.zero_stage", stage, costs[stage])


def _shorter_passes(cfg, family):
    """Down to one sequence, in the setting that bounds a pass: its tokens or, where there is no such setting,
    its rows.
    """
    rows, longest = setting(cfg, family.pass_rows), setting(cfg, family.max_length)
    if family.pass_tokens:
        key, size, smallest = family.pass_tokens, setting(cfg, family.pass_tokens) or rows * longest, longest
    else:
        key, size, smallest = family.pass_rows, rows, 1
    while size > smallest:
        size = max(smallest, size // 2)
        yield Choice(key, size, "shorter passes")


def _fewer_rows(cfg):
    """Fewer rows generated at once."""
    rows = min(cfg.ppo.batch_size * cfg.sampling.num_return_sequences, cfg.sampling.batch_size or 1 << 30)
    while rows > 1:
        rows //= 2
        yield Choice("sampling.batch_size", rows, "fewer rows generated at once")
