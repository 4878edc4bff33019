"""After training: temperatures and thresholds from the held-out rows, into the saved model; its quality.

Half of the held-out prompts tune and the other half are measured, so that the printed quality is of rows that
no threshold has seen. The thresholds that are saved are those of the tuning half.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.batches import split_by_prompt
from ..data.moderation_examples import ModerationExample
from ..models.moderator_spec import Calibration, write_spec
from ..runtime import console, disk
from .evaluate import report_quality
from .labels import labels_of
from .moderator import Moderator
from .predict import logits_of, predictions_of
from .thresholds import calibration_as_text, source_thresholds, temperatures_of, thresholds_of

if TYPE_CHECKING:
    from ..config.stages import ModerationConfig


def tune_and_report(
    folder: Path, held_out: Sequence[ModerationExample], cfg: "ModerationConfig"
) -> dict[str, Any]:
    """Tunes the moderator in <folder>/model and writes thresholds.json, quality.json and quality.html.

    Args:
        folder: The run's folder.
        held_out: The evaluation examples.
        cfg: Settings of the stage.

    Returns:
        What the run's summary says: threshold_version, and figures of the measured half.
    """
    moderator = Moderator.from_pretrained(
        folder / "model",
        batch_tokens=cfg.train.pass_tokens(),
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
    )
    # another seed than that of the held-out split, which has the smallest numbers of its own
    measured, tuning = split_by_prompt(held_out, 0.5, cfg.seed + 1)
    if not measured or not tuning:  # one prompt alone
        console.warn("thresholds are tuned and measured on the same rows: the held-out data have one prompt")
        measured = tuning = list(held_out)
    moderator = dataclasses.replace(moderator, calibration=calibrated(moderator, tuning, folder, cfg))
    write_spec(folder / "model", moderator.model.spec, moderator.calibration)
    logits_SX = logits_of(moderator, measured)
    predictions = predictions_of(moderator, measured, logits_SX)
    values = report_quality(folder, moderator, measured, predictions, cfg.seed)
    unsafe = values["outputs"]["unsafe"]
    return {
        "threshold_version": moderator.calibration.version,
        "quality/unsafe_auroc": unsafe.get("auroc"),
        "quality/unsafe_f1": unsafe.get("f1"),
        "quality/macro_f1": values.get("categories", {}).get("macro_f1"),
        "quality/kappa": values["severity"].get("kappa"),
    }


def calibrated(
    moderator: Moderator, tuning: Sequence[ModerationExample], folder: Path, cfg: "ModerationConfig"
) -> Calibration:
    """Temperatures and thresholds from tuning rows; writes thresholds.json."""
    spec = moderator.model.spec
    logits_SX, labels = logits_of(moderator, tuning), labels_of(tuning, spec)
    truth = labels.true_SX.numpy().astype(bool), labels.known_SX.numpy()
    temperatures, shifts = temperatures_of(logits_SX, *truth, spec)
    calibration = Calibration(temperatures, shifts, tuned_on=f"{len(tuning)} held-out rows")
    scaled_SX = dataclasses.replace(moderator, calibration=calibration).scaled(logits_SX)
    table, reached, untuned = thresholds_of(scaled_SX, *truth, spec, cfg.thresholds, cfg.seed)
    per_source = {}
    if cfg.thresholds.per_source:
        sources = [example.source for example in tuning]
        per_source = source_thresholds(sources, scaled_SX, truth, spec, cfg.thresholds)
    calibration = dataclasses.replace(calibration, thresholds=table, per_source=per_source)
    if untuned:
        console.warn(f"one class only in the held-out rows, so the threshold stays 0.5: {', '.join(untuned)}")
    console.result_table(
        f"thresholds {calibration.version} on {len(tuning)} held-out rows",
        ["output", "preset", "threshold", "F1 [95 %]", "FPR [95 %]", "positives"],
        calibration_as_text(calibration, reached),
    )
    disk.write_json(
        folder / "thresholds.json",
        {
            "version": calibration.version,
            "temperatures": calibration.temperatures,
            "level_shifts": calibration.level_shifts,
            "untuned": untuned,
            "outputs": {
                name: {preset: dataclasses.asdict(item) for preset, item in presets.items()}
                for name, presets in reached.items()
            },
        },
    )
    return calibration
