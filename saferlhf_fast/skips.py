"""Steps that are left out because a number in them was not finite, on whichever rank: counted, and the end after too many."""

from .errors import NonFinite
from .runtime import console


class Skips:
    """Counts them; the same on all ranks, since what is not finite was told to all.

    limit: so many in a row end the run.
    """

    def __init__(self, limit):
        self.limit, self.total, self.row = limit, 0, 0

    def note(self, step, bad, save):
        """bad: what was not finite in a step; empty when it was taken · save: () -> path of the batch, written when the run
        ends here (every rank calls it)."""
        if not bad:
            self.row = 0
            return
        self.total, self.row = self.total + 1, self.row + 1
        if self.row >= self.limit:
            in_a_row = f" in {self.row} steps one after the other" if self.row > 1 else ""
            raise NonFinite(f"step {step}: {', '.join(bad)}: expected finite numbers, got NaN or inf{in_a_row}; the batch is "
                            f"saved in {save()}, no weight was changed by what was not finite; try a lower learning rate, or "
                            "fp32")
        console.warn(f"step {step} is left out on all ranks: {', '.join(bad)} not finite ({self.total} so far)")

    def state_dict(self):
        """For a checkpoint."""
        return {"total": self.total, "row": self.row}

    def load_state_dict(self, values):
        """From a checkpoint."""
        self.total, self.row = values["total"], values["row"]
