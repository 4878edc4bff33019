"""What follows each PPO step: metrics, terminal, warnings, evaluation, saved policies, checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...runtime import console
from ...runtime.checkpoint.checkpointer import Checkpoints
from ...runtime.metrics import Metrics
from ..anomalies import (
    EngineGapAlarm,
    LossSpikeMonitor,
    MultiplierSaturation,
    NonFiniteGuard,
    SpareMassAlarm,
)
from ..stage_helpers import go_on_without
from .selection import PolicySelection
from .step_metrics import sample_rows, save_batch

if TYPE_CHECKING:
    from ...config.stages import PPOConfig
    from ...rollout.types import Rollout, Scored


@dataclass(frozen=True)
class AfterStep:
    """Called after each step of the loop, on every rank."""

    cfg: "PPOConfig"
    stage: str
    steps: int  # the last step
    metrics: Metrics
    bar: console.Track
    guard: NonFiniteGuard
    monitors: Sequence[LossSpikeMonitor | MultiplierSaturation]
    alarms: Sequence[EngineGapAlarm | SpareMassAlarm]  # whose results are metrics too
    selection: PolicySelection
    checkpoints: Checkpoints

    def __call__(
        self, step: int, values: dict[str, float], rollout: "Rollout", scored: "Scored", bad: list[str]
    ) -> None:
        """Reports a step and does what is due.

        Args:
            step: Number of the step, from 1.
            values: The metrics of the step.
            rollout: The batch that it learned from.
            scored: The scores of the batch.
            bad: Names of what was not finite; the step was then skipped.
        """
        log, is_last = self.cfg.log, step == self.steps
        for alarm in self.alarms:
            values = {**values, **alarm.look(step, values)}
        self.guard.note(step, bad, lambda: save_batch(self.cfg, step, rollout, scored))
        if step % log.interval == 0 or is_last:
            self.metrics.log(step, {f"train/{name}": value for name, value in values.items()})
        console.step_line(step, self.steps, values)
        self.bar.advance(tokens=int(values["tokens"]))
        if step % log.sample_interval == 0:
            console.sample_table(sample_rows(rollout, scored, log.samples))
        for monitor in self.monitors:
            monitor.look(step, values)
        if is_last or self._is_due(self.cfg.evaluation.interval, step):
            self.metrics.log(step, self.selection.offer(step))
        if not is_last and self._is_due(self.cfg.save_interval, step):
            required = self.cfg.checkpoint.required
            go_on_without(lambda: self.selection.save_snapshot(self.stage, step), required)
        self.checkpoints.after_step(step, self.selection.score(step))

    @staticmethod
    def _is_due(interval: int | None, step: int) -> bool:
        return interval is not None and step % interval == 0
