"""Which weights a training run ends with: the last ones, or those of its best evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class BestCheckpoint:
    """The best evaluation of a run so far, and the weights that were evaluated.

    Attributes:
        step: Step of that evaluation; None before the first.
        evaluation: What the stage offered: numbers, texts, lists and dicts, which a checkpoint can store.
        weights: What `keep` returned then.
    """

    def __init__(
        self, score: Callable[[Any], Sequence[float]], keep: Callable[[], Any] | None = None
    ) -> None:
        """Starts without an evaluation.

        Args:
            score: Maps an evaluation to numbers that are compared in their order; higher is better.
            keep: Called when an evaluation is the best so far. Returns the current weights, for a checkpoint
                to store, or None when it wrote them into the run's folder. Without `keep` the last
                evaluation counts, whatever its score.
        """
        self.score, self.keep = score, keep
        self.step: int | None = None
        self.evaluation: Any = None
        self.weights: Any = None

    def offer(self, step: int, evaluation: Any) -> None:
        """Stores an evaluation, and the weights, when it is the best so far.

        Args:
            step: The step after which the model was evaluated.
            evaluation: What `score` takes: numbers, texts, lists and dicts.

        Raises:
            DiskError: `keep` could not write the weights; what was the best so far still is.
        """
        # The old score is computed again, not stored: a threshold that it depends on may have been loaded
        # from a checkpoint since.
        if (
            self.keep is not None
            and self.step is not None
            and not tuple(self.score(evaluation)) > tuple(self.score(self.evaluation))
        ):
            return
        # first: where the weights cannot be kept, the best evaluation stays the one whose weights are
        weights = None if self.keep is None else self.keep()
        self.step, self.evaluation, self.weights = step, evaluation, weights

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"step": self.step, "evaluation": self.evaluation, "weights": self.weights}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint, also of an older version."""
        values = _in_current_form(values)
        self.step, self.evaluation, self.weights = values["step"], values["evaluation"], values["weights"]


def _in_current_form(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """State in today's names. Older PPO stages wrote "rows", older supervised stages "values"."""
    if "evaluation" in values:
        return values
    if "rows" in values:
        evaluation = {"rows": values["rows"], "multiplier": values["multiplier_then"]}
        return {"step": values["step"], "evaluation": evaluation, "weights": values["state"]}
    return {"step": values["step"], "evaluation": values["values"], "weights": None}
