"""What makes a stage fit that does not: settings that are tried one after the other, the cheapest first.

Each option is given as the words to type. `alone` is the stage's peak when nothing else is changed,
`together` the peak with the earlier options that helped. At the end, options that are not needed are removed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config.checks import check_settings
from ...config.sections import Optimizer
from ...config.stage_table import FAMILIES, STAGE_SPECS, Family
from ...errors import UserError
from .phases import Hardware
from .stage_phases import plan_stage

if TYPE_CHECKING:
    from ...config.stages import PPOConfig

WORTH = 0.98  # an option that leaves a larger share of the peak than this does not help
LORA_RANK = 16


class Choice(NamedTuple):
    """A setting to try."""

    key: str
    value: object
    cost: str  # what it costs, in words
    also: str = ""  # another key that gets the same value

    def words(self, stage: str | None = None) -> str:
        """Returns the words to type, for a stage of a recipe or for a single stage."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return " ".join(
            f"{stage + '.' if stage else ''}{key}={value}" for key in (self.key, self.also) if key
        )


class Option(NamedTuple):
    """A choice that was tried, and the stage's peak with it."""

    choice: Choice
    alone: int | None  # bytes; None: the setting is not allowed alone
    together: int  # bytes, with the options before it
    fits: bool


class Advice(NamedTuple):
    """The result of the search.

    Attributes:
        tried: The options that helped.
        enough: The choices that make the stage fit; none when no combination did.
        peak: The stage's peak with `enough`, or with all that was tried (bytes).
    """

    tried: list[Option]
    enough: list[Choice]
    peak: int


def changed(cfg: Any, key: str, value: object) -> Any:
    """Returns a copy of a config in which one dotted key has another value.

    Args:
        cfg: A settings dataclass.
        key: The setting, with dots between groups.
        value: Its new value.
    """
    first, _, inner = key.partition(".")
    return dataclasses.replace(cfg, **{first: changed(getattr(cfg, first), inner, value) if inner else value})


def setting(cfg: object, key: str) -> Any:
    """Returns the value of one dotted key."""
    return functools.reduce(getattr, key.split("."), cfg)


def advise(
    name: str, kind: str, cfg: Any, hardware: Hardware, earlier: Mapping[str, Any], usable: int
) -> Advice:
    """Looks for settings that make a stage fit whose peak is too large.

    Args:
        name: What the recipe calls the stage.
        kind: The kind of stage.
        cfg: Its config.
        hardware: What it runs on.
        earlier: {output folder: its config} of the stages before it in the same recipe.
        usable: Bytes of a device that the stage may take.
    """

    def with_choices(chosen: Iterable[Choice]) -> Any:
        new = cfg
        for choice in chosen:
            for key in (choice.key, choice.also):
                new = changed(new, key, choice.value) if key else new
        return new

    @functools.cache
    def peak(chosen: tuple[Choice, ...]) -> int | None:
        """Bytes, or None where the settings contradict each other."""
        new = with_choices(chosen)
        return plan_stage(name, kind, new, hardware, earlier).worst.total if _possible(kind, new) else None

    def peak_of(chosen: tuple[Choice, ...]) -> int:
        size = peak(chosen)
        assert size is not None, "only choices that are allowed together are selected"
        return size

    def fits(chosen: tuple[Choice, ...]) -> bool:
        size = peak(chosen)
        return size is not None and size <= usable

    selected: tuple[Choice, ...] = ()
    tried: list[Option] = []
    for choice in choices(kind, cfg, hardware):
        new = (*(k for k in selected if k.key != choice.key), choice)
        together = peak(new)
        if together is None or together > WORTH * peak_of(selected):
            continue
        selected = new
        tried.append(Option(choice, peak((choice,)), together, together <= usable))
        if together <= usable:
            break
    if peak_of(selected) > usable:
        return Advice(tried, [], peak_of(selected))
    selected = _relaxed(selected, [option.choice for option in tried], fits)
    return Advice(tried, list(selected), peak_of(selected))


def _relaxed(
    selected: tuple[Choice, ...],
    tried: Sequence[Choice],
    fits: Callable[[tuple[Choice, ...]], bool],
) -> tuple[Choice, ...]:
    """Removes choices that are not needed, and replaces others by milder values that were tried before."""
    for choice in selected:
        milder = [other for other in tried[: tried.index(choice)] if other.key == choice.key]
        for other in (None, *milder):
            new = tuple(
                k if k is not choice or other is None else other
                for k in selected
                if k is not choice or other is not None
            )
            if fits(new):
                selected = new
                break
    return selected


def _possible(kind: str, cfg: Any) -> bool:
    """Whether the stage itself would accept these settings."""
    try:
        check_settings(kind, cfg)
    except UserError:
        return False
    return True


def choices(kind: str, cfg: Any, hardware: Hardware) -> Iterator[Choice]:
    """Yields what a recipe of a kind of stage can change, the cheapest first.

    Args:
        kind: The kind of stage.
        cfg: Its config.
        hardware: What it runs on.
    """
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
    if optimizers and cfg.lora.bits is None:
        yield Choice("lora.bits", 4, "the base in 4 bits, dequantised in every pass")
    if not cfg.engine.offload_parameters and hardware.gpus > 1:
        yield Choice("engine.offload_parameters", True, "weights cross the bus in every pass")


def _sharding(cfg: Any, stages: Iterable[int]) -> Iterator[Choice]:
    """Yields higher ZeRO stages."""
    costs = {
        1: "optimiser states gathered once a step",
        2: "gradients reduced in every pass",
        3: "weights gathered in every pass",
    }
    for stage in stages:
        if stage > cfg.engine.zero_stage:
            yield Choice("engine.zero_stage", stage, costs[stage])


def _shorter_passes(cfg: Any, family: Family) -> Iterator[Choice]:
    """Yields shorter passes, down to one sequence.

    The setting is the one that bounds a pass: its tokens or, where there is no such setting, its rows.
    """
    rows, longest = setting(cfg, family.pass_rows), setting(cfg, family.max_length)
    if family.pass_tokens:
        key, size, smallest = family.pass_tokens, setting(cfg, family.pass_tokens) or rows * longest, longest
    else:
        key, size, smallest = family.pass_rows, rows, 1
    while size > smallest:
        size = max(smallest, size // 2)
        yield Choice(key, size, "shorter passes")


def _fewer_rows(cfg: "PPOConfig") -> Iterator[Choice]:
    """Yields fewer rows that are generated at once."""
    rows = min(cfg.ppo.batch_size * cfg.sampling.num_return_sequences, cfg.sampling.batch_size or 1 << 30)
    while rows > 1:
        rows //= 2
        yield Choice("sampling.batch_size", rows, "fewer rows generated at once")
