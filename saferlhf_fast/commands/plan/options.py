"""What makes a stage fit that does not: settings tried one after the other, those that cost least first.

Each option is the words to type. `alone` is the stage's peak with nothing else changed, `together` with what stands above it,
as far as it helped; at the end what is not needed is taken back out.
"""

import dataclasses
import functools
from typing import NamedTuple

from ...config.checks import check_settings
from ...config.stages import PPOConfig
from ...errors import UserError
from .stage_phases import plan_stage

WORTH = 0.98             # an option that leaves more of the peak than this is no help
LORA_RANK = 16


class Choice(NamedTuple):
    """A setting to try."""

    key: str
    value: object
    cost: str
    also: str = ""                       # another key that gets the same value

    def words(self, stage=None):
        """As it is typed, for a stage of a recipe or alone."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return " ".join(f"{stage + '.' if stage else ''}{key}={value}" for key in (self.key, self.also) if key)


class Option(NamedTuple):
    """A choice that was tried, and what came of it (bytes)."""

    choice: Choice
    alone: int | None                    # None: it cannot stand alone
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


def advise(name, kind, cfg, hardware, earlier, usable):
    """-> Advice for a stage whose peak is above `usable` bytes."""
    def after(chosen):
        new = cfg
        for choice in chosen:
            for key in (choice.key, choice.also):
                new = changed(new, key, choice.value) if key else new
        return new

    @functools.lru_cache(maxsize=None)
    def peak(chosen):
        """Bytes, or None where the settings do not go together."""
        new = after(chosen)
        return plan_stage(name, kind, new, hardware, earlier).worst.total if _possible(kind, new) else None

    kept, tried = (), []
    for choice in choices(cfg, hardware):
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
    kept = _relaxed(kept, [option.choice for option in tried],
                    lambda chosen: peak(chosen) is not None and peak(chosen) <= usable)
    return Advice(tried, list(kept), peak(kept))


def _relaxed(kept, tried, fits):
    """Without what is not needed after all, and with milder values (those tried before) of what is."""
    for choice in kept:
        milder = [other for other in tried[:tried.index(choice)] if other.key == choice.key]
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


def choices(cfg, hardware):
    """Yields what a recipe of this kind can change, those that cost least first."""
    yield from _smaller_batches(cfg)
    if cfg.engine.precision == "fp32" and hardware.device == "cuda":
        yield Choice("engine.precision", "bf16", "rounding to 8 bits in forward and backward")
    trains = hasattr(cfg, "optim")
    if trains and hardware.gpus > 1:
        yield from _sharding(cfg, (1, 2))
    owner, at = (cfg.train, "train.") if hasattr(cfg, "train") else (cfg, "")
    if getattr(owner, "gradient_checkpointing", True) is False:
        yield Choice(f"{at}gradient_checkpointing", True, "a third more time in passes")
    if isinstance(cfg, PPOConfig) and cfg.ppo.overlap:
        yield Choice("ppo.overlap", False, "rollout and update take turns")
    if isinstance(cfg, PPOConfig) and cfg.ppo.single_pass:
        yield Choice("ppo.single_pass", False, "a forward pass more of each trained model")
    if hardware.gpus > 1:
        yield from _sharding(cfg, (3,))
    if trains and cfg.optim.kind == "adamw":
        yield Choice("optim.kind", "adamw-8bit", "moments in 8 bits", "critic_optim.kind" if isinstance(cfg, PPOConfig) else "")
    if trains and not cfg.engine.offload_optimizer:
        if cfg.engine.zero_stage == 0 and hardware.gpus == 1:
            yield from _sharding(cfg, (2,))
        yield Choice("engine.offload_optimizer", True, "the step runs on the CPU")
    if isinstance(cfg, PPOConfig) and cfg.cost and not cfg.ppo.shared_critic and cfg.lora.rank == 0:
        yield Choice("ppo.shared_critic", True, "one critic with two heads")
    if trains and cfg.lora.rank == 0:
        on_one_base = ", on one base" if isinstance(cfg, PPOConfig) else ""
        yield Choice("lora.rank", LORA_RANK, f"adapters alone are trained{on_one_base}")
    if not cfg.engine.offload_parameters and hardware.gpus > 1:
        yield Choice("engine.offload_parameters", True, "weights cross the bus in every pass")


def _sharding(cfg, stages):
    costs = {1: "optimiser states gathered once a step", 2: "gradients reduced in every pass",
             3: "weights gathered in every pass"}
    for stage in stages:
        if stage > cfg.engine.zero_stage:
            yield Choice("engine.zero_stage", stage, costs[stage])


def _smaller_batches(cfg):
    """Shorter passes, down to one sequence; fewer rows generated at once."""
    sampling = getattr(cfg, "sampling", None)
    if hasattr(cfg, "train"):
        key, longest, tokens = "train.micro_tokens", cfg.train.max_length, cfg.train.pass_tokens()
    elif isinstance(cfg, PPOConfig):
        key, longest, tokens = "ppo.micro_tokens", cfg.max_length, cfg.pass_tokens()
    else:
        key, longest, tokens = "batch_size", 1, cfg.batch_size
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        yield Choice(key, tokens, "shorter passes")
    if sampling is None or not isinstance(cfg, PPOConfig):
        return
    rows = min(cfg.ppo.batch_size * sampling.num_return_sequences, sampling.batch_size or 1 << 30)
    while rows > 1:
        rows //= 2
        yield Choice("sampling.batch_size", rows, "fewer rows generated at once")
