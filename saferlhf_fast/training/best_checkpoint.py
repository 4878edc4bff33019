"""Which of its weights a run ends with: the last, or those of its best evaluation.

Every stage that trains asks it.
"""


class BestCheckpoint:
    """The best evaluation of a run so far, and the weights that were evaluated.

    Attributes:
        step: Of that evaluation; None before the first.
        evaluation: What the stage offered: numbers, texts, lists and dicts, which a checkpoint can hold.
        weights: What `keep` returned then.
    """

    def __init__(self, score, keep=None):
        """score: evaluation -> tuple of numbers, higher is better · keep: () -> the weights of this moment
        for a checkpoint to hold, or None when it put them into the run's folder. Without `keep` the last
        evaluation counts, whatever its score.
        """
        self.score, self.keep = score, keep
        self.step = self.evaluation = self.weights = None

    def offer(self, step, evaluation):
        """Remembers an evaluation, and the weights, when it is the best so far."""
        # The score is worked out anew, not kept: what a stage scores by may be loaded from a checkpoint after
        # this.
        if (
            self.keep is not None
            and self.step is not None
            and not self.score(evaluation) > self.score(self.evaluation)
        ):
            return
        self.step, self.evaluation = step, evaluation
        self.weights = None if self.keep is None else self.keep()

    def state_dict(self):
        """For a checkpoint."""
        return {"step": self.step, "evaluation": self.evaluation, "weights": self.weights}

    def load_state_dict(self, values):
        """From a checkpoint, an older one too."""
        values = _from_older(values)
        self.step, self.evaluation, self.weights = values["step"], values["evaluation"], values["weights"]


def _from_older(values):
    """Each kind of stage once had names of its own: ppo and ppo-lag wrote "rows", supervised stages "values"."""
    if "evaluation" in values:
        return values
    if "rows" in values:
        evaluation = {"rows": values["rows"], "multiplier": values["multiplier_then"]}
        return {"step": values["step"], "evaluation": evaluation, "weights": values["state"]}
    return {"step": values["step"], "evaluation": values["values"], "weights": None}
