"""Steps that go wrong: a number that is not finite, a loss that jumps, a λ that stays at its upper bound.

`NonFiniteGuard` counts the steps that were skipped because a number in them was not finite on some rank, and
ends the run after too many. The other two only warn. A spike is a loss above twice the median of the last
`WINDOW` steps, for `PATIENCE` steps in a row; it is reported once until it is over. The rule is like that of
composer's KillLossSpike (outliers of factor 2, four in a row), which by default does not stop a run either.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from ..errors import DiskError, NonFinite
from ..runtime import console

FACTOR, PATIENCE, WINDOW, LEAST = 2.0, 4, 100, 20


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
