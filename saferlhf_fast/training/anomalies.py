"""Steps that are not as they should be: they are left out where a number was not finite; a loss that jumps
and a λ that stays at its bound get a warning.

`NonFiniteGuard` counts the steps that were left out because a number in them was not finite, on whichever
rank, and ends the run after too many. The other two only warn. A spike: `PATIENCE` steps in a row above twice
the median of the last `WINDOW` steps, told once until it is over. The rule is composer's KillLossSpike in
kind (outliers of factor 2, four in a row), which by default does not stop a run either.
"""

import math
from collections import deque
from statistics import median

from ..errors import NonFinite
from ..runtime import console

FACTOR, PATIENCE, WINDOW, LEAST = 2.0, 4, 100, 20


class NonFiniteGuard:
    """Counts steps that are left out; the same on all ranks, since what is not finite was told to all.

    limit: so many in a row end the run.
    """

    def __init__(self, limit):
        self.limit, self.total, self.row = limit, 0, 0

    def note(self, step, bad, save):
        """bad: what was not finite in a step; empty when it was taken · save: () -> path of the batch,
        written when the run ends here (every rank calls it).
        """
        if not bad:
            self.row = 0
            return
        self.total, self.row = self.total + 1, self.row + 1
        if self.row >= self.limit:
            in_a_row = f" in {self.row} steps one after the other" if self.row > 1 else ""
            raise NonFinite(
                f"step {step}: {', '.join(bad)}: expected finite numbers, got NaN or inf{in_a_row}; the "
                f"batch is "
                f"saved in {save()}, no weight was changed by what was not finite; try a lower learning "
                f"rate, or "
                "fp32"
            )
        console.warn(
            f"step {step} is left out on all ranks: {', '.join(bad)} not finite ({self.total} so far)"
        )

    def state_dict(self):
        """For a checkpoint."""
        return {"total": self.total, "row": self.row}

    def load_state_dict(self, values):
        """From a checkpoint."""
        self.total, self.row = values["total"], values["row"]


class LossSpikeMonitor:
    """Looks at losses that are above 0 in a healthy run."""

    def __init__(self, names):
        self.seen = {name: deque(maxlen=WINDOW) for name in names}
        self.row = dict.fromkeys(names, 0)

    def look(self, step, values):
        """values: {name: number} of a step; warns when one has jumped."""
        for name, seen in self.seen.items():
            value = values.get(name)
            if value is None or not math.isfinite(value):
                continue
            usual = median(seen) if len(seen) >= LEAST else None
            if usual is None or usual <= 0 or value <= FACTOR * usual:
                self.row[name] = 0
                seen.append(value)
                continue
            self.row[name] += 1  # spikes do not become the usual
            if self.row[name] == PATIENCE:
                console.warn(
                    f"step {step}: {name} {value:.4g} has been above {FACTOR:g} times its median of "
                    f"{usual:.4g} for "
                    f"{PATIENCE} steps; a lower learning rate, or an earlier checkpoint, may help"
                )


class MultiplierSaturation:
    """Looks at λ: at its upper bound for `patience` steps the constraint is not met however hard it is
    weighed.
    """

    def __init__(self, bound, threshold, patience=20, value="lambda", mean_cost="episode_cost"):
        """value, mean_cost: names of λ and J_C among a step's numbers."""
        self.bound, self.threshold, self.patience, self.row = bound, threshold, patience, 0
        self.value, self.mean_cost = value, mean_cost

    def look(self, step, values):
        """values: {name: number} of a step."""
        self.row = self.row + 1 if values.get(self.value, 0.0) >= self.bound * (1 - 1e-6) else 0
        if self.row == self.patience:
            console.warn(
                f"step {step}: λ has been at its bound of {self.bound:g} for {self.patience} steps, with a "
                f"mean cost of "
                f"{values.get(self.mean_cost, math.nan):.3g} against a threshold of {self.threshold:.3g}: "
                f"the policy "
                "cannot get there; a higher multiplier.max, a higher threshold or a lower ppo.kl_coeff may "
                "help "
                "(docs/lambda.md)"
            )
