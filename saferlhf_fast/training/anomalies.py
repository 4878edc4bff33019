"""Steps that go wrong: a number that is not finite, a loss that jumps, a λ that stays at its upper bound.

And samples that are not the policy's: a rollout engine whose log-probs are not those of the trainer, and a
policy with much probability on rows that have no token.

`NonFiniteGuard` counts the steps that were skipped because a number in them was not finite on some rank, and
ends the run after too many. The others only warn. A spike is a loss above twice the median of the last
`WINDOW` steps, for `PATIENCE` steps in a row; it is reported once until it is over. The rule is like that of
composer's KillLossSpike (outliers of factor 2, four in a row), which by default does not stop a run either.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..errors import DiskError, NonFinite
from ..runtime import console

if TYPE_CHECKING:
    import torch

    from ..config.sections import Sampling

FACTOR, PATIENCE, WINDOW, LEAST = 2.0, 4, 100, 20
GAP_LIMIT, GAP_LIMIT_ROUNDED = 0.01, 0.1
"""Largest mean |log π_trainer − log π_engine| of a sound engine (nats): with the trainer's weights in fp32,
and otherwise, where bfloat16 and other kernels round differently (0.01 to 0.05 are usual)."""
SPARE_LIMIT = 0.01
"""Largest share of the policy's probability on rows without a token that needs no warning."""
ENGINE_GAP_ALARM, SPARE_MASS_ALARM = "engine_gap_alarm", "spare_mass_alarm"
"""Names of the metrics that are 1 in a step above its limit, else 0."""


class NonFiniteGuard:
    """Counts skipped steps, and ends the run after too many in a row.

    The count is the same on all ranks, because every rank knows what was not finite on any rank.
    """

    def __init__(self, limit: int) -> None:
        """Starts at 0.

        Args:
            limit: So many skipped steps in a row end the run.
        """
        self.limit, self.total, self.row = limit, 0, 0

    def note(self, step: int, bad: Sequence[str], save: Callable[[], Path]) -> None:
        """Counts a step; every rank must call it.

        Args:
            step: Number of the step.
            bad: Names of what was not finite in it; empty when the step was taken.
            save: Writes the batch and returns the file's path; called on every rank when the run ends here.

        Raises:
            NonFinite: If `limit` steps in a row were skipped.
        """
        if not bad:
            self.row = 0
            return
        self.total, self.row = self.total + 1, self.row + 1
        if self.row >= self.limit:
            try:
                where = f"saved in {save()}"
            except DiskError as error:  # the fault of the numbers is what the user must know
                where = f"not saved ({error})"
            in_a_row = f" in {self.row} steps one after the other" if self.row > 1 else ""
            raise NonFinite(
                f"step {step}: {', '.join(bad)}: expected finite numbers, got NaN or inf{in_a_row}; the "
                f"batch is {where}, no weight was changed by what was not finite; try a lower "
                "learning rate, or fp32"
            )
        console.warn(
            f"step {step} is left out on all ranks: {', '.join(bad)} not finite ({self.total} so far)"
        )

    def state_dict(self) -> dict[str, int]:
        """State for a checkpoint."""
        return {"total": self.total, "row": self.row}

    def load_state_dict(self, values: Mapping[str, int]) -> None:
        """Takes the state of a checkpoint."""
        self.total, self.row = values["total"], values["row"]


class LossSpikeMonitor:
    """Warns when a loss, which is above 0 in a healthy run, jumps and stays high."""

    def __init__(self, names: Iterable[str]) -> None:
        self.seen: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in names}
        self.row = dict.fromkeys(self.seen, 0)

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """Looks at the numbers of a step, by name; those without a name in `names` do not matter.

        Args:
            step: The step, for the warning.
            values: The step's numbers by name.
        """
        for name, seen in self.seen.items():
            value = values.get(name)
            if value is None or not math.isfinite(value):
                continue
            usual = median(seen) if len(seen) >= LEAST else None
            if usual is None or usual <= 0 or value <= FACTOR * usual:
                self.row[name] = 0
                seen.append(value)
                continue
            self.row[name] += 1  # a spike does not enter the median
            if self.row[name] == PATIENCE:
                console.warn(
                    f"step {step}: {name} {value:.4g} has been above {FACTOR:g} times its median of "
                    f"{usual:.4g} for {PATIENCE} steps; a lower learning rate, or an earlier checkpoint, "
                    "may help"
                )


class MultiplierSaturation:
    """Warns when λ stays at its upper bound: the constraint is not met however much the cost counts."""

    def __init__(
        self,
        bound: float,
        threshold: float,
        patience: int = 20,
        value: str = "lambda",
        mean_cost: str = "episode_cost",
    ) -> None:
        """Starts at 0 steps.

        Args:
            bound: The upper bound of λ.
            threshold: d, in the cost model's units.
            patience: So many steps at the bound give a warning.
            value: Name of λ among a step's numbers.
            mean_cost: Name of J_C among a step's numbers.
        """
        self.bound, self.threshold, self.patience, self.row = bound, threshold, patience, 0
        self.value, self.mean_cost = value, mean_cost

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """Looks at the numbers of a step, by name.

        Args:
            step: The step, for the warning.
            values: The step's numbers by name; without λ it counts as below its bound.
        """
        self.row = self.row + 1 if values.get(self.value, 0.0) >= self.bound * (1 - 1e-6) else 0
        if self.row == self.patience:
            console.warn(
                f"step {step}: λ has been at its bound of {self.bound:g} for {self.patience} steps, with a "
                f"mean cost of {values.get(self.mean_cost, math.nan):.3g} against a threshold of "
                f"{self.threshold:.3g}: the policy cannot get there; a higher multiplier.max, a higher "
                "threshold or a lower ppo.kl_coeff may help (docs/lambda.md)"
            )


class EngineGapAlarm:
    """Warns when the rollout engine's log-probs are far from those of the trainer, for the same tokens.

    They differ in the last bits in a sound run. If they do not, the samples come from another policy than the
    one that learns: PPO's ratio and its KL are wrong then, and nothing else in a run shows it.
    """

    def __init__(self, sampling: "Sampling", precision: "torch.dtype", from_kl: bool = False) -> None:
        """Takes what the limit depends on.

        Args:
            sampling: The engine; and the temperature, below 1 of which rounding counts for more.
            precision: Of the trainer's weights.
            from_kl: With the engine's log-probs as the old ones, in one pass, the gap is not measured by
                itself: KL = mean(ρ − 1 − log ρ) ≈ gap²/2 is taken for it.
        """
        exact = "float32" in str(precision) and not sampling.engine.startswith("vllm")
        self.limit = (GAP_LIMIT if exact else GAP_LIMIT_ROUNDED) / min(1.0, sampling.temperature)
        self.engine, self.from_kl, self.above = sampling.engine, from_kl, False

    def look(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Looks at the numbers of a step, by name, and warns at the first of those above the limit.

        A batch of older weights (staleness) is not looked at: the policy itself has changed since.

        Args:
            step: The step, for the warning.
            values: The step's numbers by name.

        Returns:
            {"engine_gap_alarm": 1 or 0}; empty where the gap was not measured.
        """
        gap = values.get("engine_gap_mean")
        if gap is None and self.from_kl and "approx_kl" in values:
            gap = math.sqrt(2.0 * max(0.0, values["approx_kl"]))
        if gap is None or not math.isfinite(gap) or values.get("staleness", 0.0) > 0:
            return {}
        before, self.above = self.above, gap > self.limit
        if self.above and not before:
            console.warn(
                f"step {step}: {engine_gap_text(gap)} (engine {self.engine}; up to {self.limit:.2g} is "
                "rounding); expected equal ones: try sampling.engine=generate with sampling.batch_size=1, "
                "which pads nothing, check that a server serves this model, or correct the loss by "
                "ppo.importance_cap (docs/rollouts.md)"
            )
        return {ENGINE_GAP_ALARM: float(self.above)}


def engine_gap_text(gap: float | None) -> str:
    """What an alarm says of a gap: the mean difference of log-probs, in nats; None: it is not known."""
    by = "" if gap is None else f" by {gap:.3g} nats a token"
    return (
        f"the log-probs of the rollout engine differ from the trainer's{by}: it samples from another policy "
        "than the one that is trained"
    )


class SpareMassAlarm:
    """Warns when much of the policy's probability is on rows of its head that have no token."""

    def __init__(self) -> None:
        self.above = False

    def look(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Looks at the numbers of a step, by name, and warns at the first of those above the limit.

        Args:
            step: The step, for the warning.
            values: The step's numbers by name.

        Returns:
            {"spare_mass_alarm": 1 or 0}; empty where there are no such rows.
        """
        mass = values.get("spare_mass")
        if mass is None or not math.isfinite(mass):
            return {}
        before, self.above = self.above, mass > SPARE_LIMIT
        if self.above and not before:
            warn_spare_mass(f"step {step}: ", mass)
        return {SPARE_MASS_ALARM: float(self.above)}


def spare_mass_text(mass: float | None) -> str:
    """What an alarm says of a share of probability, 0 to 1; None: it is not known."""
    share = "much" if mass is None else f"{100 * mass:.3g} %"
    return (
        f"{share} of the policy's probability is on rows of its head without a token; they are "
        "never sampled here, and log-probs are those of the other tokens alone"
    )


def warn_spare_mass(place: str, mass: float) -> None:
    """Warns of a share of probability above the limit; `place` says where it was measured."""
    console.warn(
        f"{place}{spare_mass_text(mass)}; other programs may sample them: expected a model whose embedding "
        "has as many rows as the tokenizer has tokens (resize_token_embeddings), or more training by the "
        "stage sft (docs/rollouts.md)"
    )
