"""What a run should be looked at for, while it goes on: a loss that jumps, a multiplier that stays at its bound. Warnings only.

A spike: `PATIENCE` steps in a row above twice the median of the last `WINDOW` steps, told once until it is over. The rule is
composer's KillLossSpike in kind (outliers of factor 2, four in a row), which by default does not stop a run either.
"""

import math
from collections import deque
from statistics import median

from .runtime import console

FACTOR, PATIENCE, WINDOW, LEAST = 2.0, 4, 100, 20


class Spikes:
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
            self.row[name] += 1                          # spikes do not become the usual
            if self.row[name] == PATIENCE:
                console.warn(f"step {step}: {name} {value:.4g} has been above {FACTOR:g} times its median of {usual:.4g} for "
                             f"{PATIENCE} steps; a lower learning rate, or an earlier checkpoint, may help")


class AtBound:
    """Looks at λ: at its upper bound for `patience` steps the constraint is not met however hard it is weighed."""

    def __init__(self, bound, threshold, patience=20):
        self.bound, self.threshold, self.patience, self.row = bound, threshold, patience, 0

    def look(self, step, values):
        """values: {"lambda", "episode_cost"} of a step."""
        self.row = self.row + 1 if values.get("lambda", 0.0) >= self.bound * (1 - 1e-6) else 0
        if self.row == self.patience:
            console.warn(f"step {step}: λ has been at its bound of {self.bound:g} for {self.patience} steps, with a mean cost of "
                         f"{values.get('episode_cost', math.nan):.3g} against a threshold of {self.threshold:.3g}: the policy "
                         "cannot get there; a higher multiplier.max, a higher threshold or a lower ppo.kl_coeff may help "
                         "(docs/lambda.md)")
