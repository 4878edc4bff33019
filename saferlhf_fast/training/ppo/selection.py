"""Which of a run's policies is kept: the last, or the best one whose mean costs are under their thresholds."""

from pathlib import Path

from ...config.sections import COST, REWARD
from ...rollout.sample_and_score import sample_and_score, summary_of
from ...rollout.types import per_constraint
from ...runtime import console, engine
from ..best_checkpoint import BestCheckpoint
from ..stage_helpers import save_policy
from .constraints import one_or_each


class PolicySelection:
    """Evaluates the actor and keeps the weights that the recipe asks for: the last, or the best under the
    threshold.
    """

    def __init__(self, roles, held_out, cfg, folder, multipliers, observe=None):
        """multipliers: {constraint: its rule} · observe: rows of an evaluation -> more metrics to log with
        it.
        """
        self.roles, self.held_out, self.cfg = roles, held_out, cfg
        self.folder, self.multipliers = Path(folder), multipliers
        self.observe = observe or (lambda rows: {})
        self.best = BestCheckpoint(
            lambda evaluation: self._score(summary_of(evaluation["rows"])),
            roles.actor.state_dict if cfg.evaluation.select else None,
        )
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
    def limits(self):
        """{name of a mean cost in an evaluation: under which one counts as feasible}; {} without a
        constraint.
        """
        return {
            per_constraint(COST, name, self.multipliers): multiplier.threshold - self.cfg.evaluation.margin
            for name, multiplier in self.multipliers.items()
        }

    def metrics(self, rows):
        """What is logged of an evaluation."""
        thresholds = {
            f"eval/{per_constraint('threshold', name, self.multipliers)}": multiplier.threshold
            for name, multiplier in self.multipliers.items()
        }
        return {**{f"eval/{k}": v for k, v in summary_of(rows).items()}, **thresholds, **self.observe(rows)}

    def offer(self, step):
        """Evaluates -> metrics; remembers the weights when they are the best so far."""
        rows = sample_and_score(self.roles, self.held_out, self.cfg)
        self.offered = (step, self._score(summary_of(rows)))
        values = one_or_each({name: float(multiplier.value) for name, multiplier in self.multipliers.items()})
        self.best.offer(step, {"rows": rows, "multiplier": values})
        return self.metrics(rows)

    def _score(self, values):
        """Feasible ones by reward, above infeasible ones by how little the costs that exceed their limits
        are.
        """
        above = [values[name] for name, limit in self.limits.items() if not values[name] <= limit]
        return (0, -sum(above)) if above else (1, values[REWARD])

    def settle(self, card):
        """Puts the kept weights back and saves them in folder/model -> (their evaluation's rows, their step,
        λ at that step).
        """
        best = self.best
        if self.cfg.evaluation.select:
            if best.score(best.evaluation)[0] == 0:
                limits = ", ".join(f"{limit:.2f}" for limit in self.limits.values())
                console.warn(
                    f"no evaluation met the threshold less the margin ({limits}); the one with the "
                    f"lowest cost is kept (step {best.step})"
                )
            self.roles.actor.load_state_dict(best.weights)
        save_policy(
            self.roles.actor, self.folder / "model", self.roles.tokenizer, {**card, "step": best.step}
        )
        return best.evaluation["rows"], best.step, best.evaluation["multiplier"]
