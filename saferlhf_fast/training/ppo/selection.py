"""Which of a run's policies is kept: the last, or the best one whose mean cost is under the threshold."""

from pathlib import Path

from ...rollout.sample_and_score import ask, summary_of
from ...runtime import console, engine
from ..best_checkpoint import BestCheckpoint
from ..stage_helpers import save_policy


class PolicySelection:
    """Evaluates the actor and keeps the weights that the recipe asks for: the last, or the best under the threshold."""

    def __init__(self, cast, held_out, cfg, folder, tokenizer, multiplier, observe=None):
        self.cast, self.held_out, self.cfg = cast, held_out, cfg
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.multiplier = multiplier
        self.observe = observe or (lambda rows: {})
        self.best = BestCheckpoint(lambda evaluation: self._score(summary_of(evaluation["rows"])),
                                   cast.actor.state_dict if cfg.evaluation.select else None)
        self.offered = None

    def score(self, step):
        """Of the evaluation in this step, higher is better; None when there was none."""
        return list(self.offered[1]) if self.offered and self.offered[0] == step else None

    def state_dict(self):
        """For a checkpoint; the kept weights are on rank 0."""
        return self.best.state_dict()

    def load_state_dict(self, values):
        """From a checkpoint."""
        self.best.load_state_dict(values)
        self.best.weights = self.best.weights if engine.rank() == 0 else None

    @property
    def limit(self):
        """The mean cost under which an evaluation counts as feasible; None without a constraint."""
        return None if self.multiplier is None else self.multiplier.threshold - self.cfg.evaluation.margin

    def metrics(self, rows):
        """What is logged of an evaluation."""
        limit = {} if self.limit is None else {"eval/threshold": self.limit + self.cfg.evaluation.margin}
        return {**{f"eval/{k}": v for k, v in summary_of(rows).items()}, **limit, **self.observe(rows)}

    def offer(self, step):
        """Evaluates -> metrics; remembers the weights when they are the best so far."""
        rows = ask(self.cast, self.held_out, self.cfg)
        self.offered = (step, self._score(summary_of(rows)))
        self.best.offer(step, {"rows": rows, "multiplier": None if self.multiplier is None else float(self.multiplier.value)})
        return self.metrics(rows)

    def _score(self, values):
        """Feasible ones by reward, above infeasible ones by how little they exceed the limit."""
        if self.limit is None or values["cost"] <= self.limit:
            return (1, values["reward"])
        return (0, -values["cost"])

    def settle(self, card):
        """Puts the kept weights back and saves them in folder/model -> (their evaluation's rows, their step, λ at that step)."""
        best = self.best
        if self.cfg.evaluation.select:
            if self.limit is not None and best.score(best.evaluation)[0] == 0:
                console.warn(f"no evaluation met the threshold less the margin ({self.limit:.2f}); the one with the "
                             f"lowest cost is kept (step {best.step})")
            self.cast.actor.load_state_dict(best.weights)
        save_policy(self.cast.actor, self.folder / "model", self.tokenizer, {**card, "step": best.step})
        return best.evaluation["rows"], best.step, best.evaluation["multiplier"]
