"""Which policy a run keeps: the last one, or the best one whose mean costs are under their thresholds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.sections import COST, REWARD
from ...rollout.sample_and_score import sample_and_score, summary_of
from ...rollout.types import per_constraint
from ...runtime import console, engine
from ..best_checkpoint import BestCheckpoint
from ..disk_space import model_bytes, warn_if_scarce
from ..stage_helpers import save_policy
from .constraints import one_or_each
from .multiplier import MultiplierRule

if TYPE_CHECKING:
    from ...config.stages import PPOConfig
    from ...data.examples import PromptExample
    from ...rollout.roles import Roles

Rows = list[dict[str, Any]]
"""An evaluation: a dict for each prompt, as `sample_and_score` gives them."""

Observer = Callable[[Rows], Mapping[str, float]]
"""Computes more metrics of an evaluation, which are logged with it and change nothing."""


class PolicySelection:
    """Evaluates the actor and keeps the weights that the recipe asks for: the last or the best ones."""

    def __init__(
        self,
        roles: "Roles",
        held_out: "Sequence[PromptExample]",
        cfg: "PPOConfig",
        folder: str | Path,
        multipliers: Mapping[str, MultiplierRule],
        observe: Observer | None = None,
    ) -> None:
        """Starts without an evaluation.

        Args:
            roles: Actor, reference and scorers.
            held_out: Evaluation prompts.
            cfg: Settings of the stage; `evaluation.select` asks for the best weights instead of the last.
            folder: Folder of the run.
            multipliers: The rule by name of the constraint, for its threshold and λ.
            observe: More metrics to log with each evaluation.
        """
        self.roles, self.held_out, self.cfg = roles, held_out, cfg
        self.folder, self.multipliers = Path(folder), multipliers
        self.observe: Observer = observe or (lambda rows: {})
        self.best = BestCheckpoint(
            lambda evaluation: self._score(summary_of(evaluation["rows"])),
            roles.trained_actor.state_dict if cfg.evaluation.select else None,
        )
        self.last_offer: tuple[int, tuple[int, float]] | None = None  # step, score

    def score(self, step: int) -> tuple[float, ...] | None:
        """Score of the evaluation in this step, higher is better; None when there was none."""
        if self.last_offer is None or self.last_offer[0] != step:
            return None
        return self.last_offer[1]

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; rank 0 has the kept weights."""
        return self.best.state_dict()

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint."""
        self.best.load_state_dict(values)
        self.best.weights = self.best.weights if engine.rank() == 0 else None

    @property
    def limits(self) -> dict[str, float]:
        """For each constrained mean cost of an evaluation, the largest value that counts as feasible."""
        return {
            per_constraint(COST, name, self.multipliers): multiplier.threshold - self.cfg.evaluation.margin
            for name, multiplier in self.multipliers.items()
        }

    def metrics(self, rows: Rows) -> dict[str, Any]:
        """What is logged of an evaluation."""
        thresholds = {
            f"eval/{per_constraint('threshold', name, self.multipliers)}": multiplier.threshold
            for name, multiplier in self.multipliers.items()
        }
        return {**{f"eval/{k}": v for k, v in summary_of(rows).items()}, **thresholds, **self.observe(rows)}

    def offer(self, step: int) -> dict[str, Any]:
        """Evaluates the actor, and keeps its weights when they are the best so far.

        Returns:
            The metrics of the evaluation.
        """
        rows = sample_and_score(self.roles, self.held_out, self.cfg)
        self.last_offer = (step, self._score(summary_of(rows)))
        values = one_or_each({name: float(multiplier.value) for name, multiplier in self.multipliers.items()})
        self.best.offer(step, {"rows": rows, "multiplier": values})
        return self.metrics(rows)

    def _score(self, means: Mapping[str, float]) -> tuple[int, float]:
        """Orders evaluations: feasible ones by reward; below them the others, by the costs over their limits.

        A NaN cost is over its limit.
        """
        over = [means[name] for name, limit in self.limits.items() if not means[name] <= limit]
        return (0, -sum(over)) if over else (1, means[REWARD])

    def save_snapshot(self, stage: str, step: int) -> None:
        """Saves the actor as it is in folder/step-<step>; every rank must call it.

        Args:
            stage: Name of the stage, for the model card.
            step: The step after which the actor is saved.
        """
        card = {"stage": stage, "step": step}
        save_policy(self.roles.trained_actor, self.folder / f"step-{step}", self.roles.tokenizer, card)

    def warn_if_disk_is_scarce(self, models: "Iterable[engine.Engine]", steps: int) -> None:
        """Warns when the disk has less room than the run may need.

        Args:
            models: All trained models.
            steps: Steps that the run will make.
        """
        size, interval = model_bytes(self.roles.trained_actor), self.cfg.save_interval
        kept = [size] * (1 + ((steps - 1) // interval if interval else 0))
        warn_if_scarce(self.folder, self.cfg.checkpoint, models, kept, steps)

    def settle(self, card: Mapping[str, Any]) -> tuple[Rows, int | None, dict[str, float] | float | None]:
        """Puts the kept weights back and saves them in folder/model; every rank must call it.

        Args:
            card: What the model card says.

        Returns:
            (rows of the kept policy's evaluation, its step, λ at that step as `one_or_each` writes it).
        """
        best = self.best
        if self.cfg.evaluation.select:
            if best.score(best.evaluation)[0] == 0:
                limits = ", ".join(f"{limit:.2f}" for limit in self.limits.values())
                console.warn(
                    f"no evaluation met the threshold less the margin ({limits}); the one with the "
                    f"lowest cost is kept (step {best.step})"
                )
            self.roles.trained_actor.load_state_dict(best.weights)
        save_policy(
            self.roles.trained_actor, self.folder / "model", self.roles.tokenizer, {**card, "step": best.step}
        )
        return best.evaluation["rows"], best.step, best.evaluation["multiplier"]
