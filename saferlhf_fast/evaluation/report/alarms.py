"""The alarms of a run that its numbers alone would hide, for report.html; none in a sound run."""

from typing import TYPE_CHECKING

from ...training.anomalies import ENGINE_GAP_ALARM, SPARE_MASS_ALARM, engine_gap_text, spare_mass_text
from . import page

if TYPE_CHECKING:
    from .read import Run

ALARMS = (
    (f"train/{ENGINE_GAP_ALARM}", "train/engine_gap_mean", engine_gap_text),
    (f"train/{SPARE_MASS_ALARM}", "train/spare_mass", spare_mass_text),
)
"""(metric that is 1 in a step above its limit, the metric that it is of, its value in words)."""


def section_of_alarms(run: "Run") -> page.Raw:
    """One line for each kind of alarm: in how many steps it was raised, and the largest value.

    Args:
        run: The run.

    Returns:
        The section; empty without an alarm.
    """
    lines = []
    for alarm, measure, text in ALARMS:
        rows = [row for row in run.metrics if row.get(alarm)]
        if rows:
            values = [row[measure] for row in rows if isinstance(row.get(measure), (int, float))]
            what = text(max(values, default=None))
            first = rows[0]["step"]
            lines.append(
                f"In {len(rows)} of the logged steps, first in step {first}: {what} (docs/rollouts.md)."
            )
    return page.section("Alarms", *map(page.paragraph, lines)) if lines else page.Raw("")
