"""`moderation evaluate`: the quality of a moderator on labelled answers, as tables, JSON and a page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.moderation_examples import ModerationExample, moderation_examples
from ..data.pair_template import pair_name
from ..errors import UserError, require
from ..models.folders import context_length
from ..runtime import console, disk
from .labels import require_label_set
from .moderator import Moderator
from .page import write_page
from .predict import logits_of, predictions_of
from .quality import Predictions, levels, prompt_only, quality

if TYPE_CHECKING:
    from ..config.moderation_stages import ModerationEvaluateConfig

FILES = ("quality.json", "predictions.jsonl", "quality.html")


def evaluate(cfg: "ModerationEvaluateConfig") -> dict[str, Any]:
    """Measures a moderator.

    Args:
        cfg: Its settings.

    Returns:
        What `quality.quality` returns, with the control.

    Raises:
        UserError: The model is no moderator, the data cannot be read or have labels that it does not
            predict, or the output holds something already.
    """
    require("moderation evaluate", "eval", "sklearn")
    folder = _folder(cfg)
    moderator = Moderator.from_pretrained(
        cfg.model,
        batch_tokens=cfg.batch_tokens,
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
    )
    spec = moderator.model.spec
    context = context_length(moderator.model.config, moderator.model.form.first) or spec.max_length
    examples, counts = moderation_examples(
        cfg.data,
        moderator.tokenizer,
        pair_name(spec.template, spec.pairs),
        min(spec.max_length, context),
        cfg.seed,
    )
    console.say(
        f"{counts['labelled']} labelled of {counts['records']} records, {counts['truncated']} truncated"
    )
    require_label_set(examples, spec, "data")
    logits_SX = logits_of(moderator, examples)
    predictions = predictions_of(moderator, examples, logits_SX, cfg.preset, cfg.threshold)
    return report_quality(folder, moderator, examples, predictions, cfg.seed, control=cfg.prompt_only)


def _folder(cfg: "ModerationEvaluateConfig") -> Path | None:
    """The output folder, which must be new, empty or replaceable."""
    if cfg.output is None:
        return None
    folder = Path(cfg.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {cfg.output} is a file; expected a folder")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found and not (cfg.overwrite and set(found) <= set(FILES)):
        hint = "" if set(found) - set(FILES) else ", or overwrite=true"
        raise UserError(f"output: {cfg.output} holds {found[0]}; expected a new or empty folder{hint}")
    with disk.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def report_quality(
    folder: Path | None,
    moderator: Moderator,
    examples: Sequence[ModerationExample],
    predictions: Predictions,
    seed: int,
    control: bool = True,
) -> dict[str, Any]:
    """Measures, prints and writes the quality of a moderator.

    Args:
        folder: Where quality.json, predictions.jsonl and quality.html go; None: nowhere.
        moderator: The moderator.
        examples: The labelled examples.
        predictions: Its probabilities of them.
        seed: Of simulations and resamples.
        control: Whether TF-IDF on the prompts alone is measured too.

    Returns:
        The quality.
    """
    spec = moderator.model.spec
    values = quality(predictions, spec, seed)
    values["threshold_version"] = moderator.calibration.version
    column = len(spec.categories)
    known = predictions.known_SX[:, column]
    if control:
        prompts = [e.prompt_text for e, flag in zip(examples, known) if flag]
        values["prompt_only"] = prompt_only(prompts, predictions.true_SX[known, column], seed)
    show(values)
    if folder is not None:
        disk.write_json(folder / "quality.json", values)
        disk.write_text(folder / "predictions.jsonl", "".join(_lines(moderator, examples, predictions)))
        write_page(folder / "quality.html", values, examples, predictions, spec)
        console.say(f"the page is {folder / 'quality.html'}")
    return values


def _lines(
    moderator: Moderator, examples: Sequence[ModerationExample], predictions: Predictions
) -> list[str]:
    """A JSON line for each row: probabilities and labels by output; no text."""
    names, level = moderator.model.spec.outputs, levels(predictions, moderator.model.spec)
    lines = []
    for i, example in enumerate(examples):
        known = predictions.known_SX[i]
        values = {
            "row": i,
            "source": example.source,
            "probabilities": dict(zip(names, np.round(predictions.probabilities_SX[i], 6).tolist())),
            "labels": {n: bool(predictions.true_SX[i, x]) for x, n in enumerate(names) if known[x]},
            "level": int(level[i]),
        }
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    return lines


def show(values: dict[str, Any]) -> None:
    """Prints the quality as tables."""
    keys = ("positives", "n", "ap", "auroc", "f1", "recall_at_fpr_5", "brier", "nll", "ece", "ece_null")
    console.result_table(
        f"quality on {values['n']} rows, thresholds {values['threshold_version']}",
        ["output", *keys],
        [[name, *(item.get(key) for key in keys)] for name, item in values["outputs"].items()],
    )
    for name, interval in values["intervals"].items():
        if interval is not None:
            console.say(f"{name}: 95 % interval {interval[0]:.3f} to {interval[1]:.3f} (by prompt)")
    if "categories" in values:
        means = values["categories"]
        shown = ", ".join(
            f"{key} {means[key]:.3f}"
            for key in ("macro_f1", "micro_f1", "macro_ap", "macro_auroc")
            if means[key] is not None
        )
        console.say(f"{means['present']} categories with a positive: {shown or 'nothing to measure'}")
        if means["absent"]:
            console.say(f"left out, without a positive: {', '.join(means['absent'])}")
    severity = values["severity"]
    if severity.get("kappa") is not None:
        console.say(
            f"severity of {severity['n']} rows: quadratic kappa {severity['kappa']:.3f}, accuracy "
            f"{severity['accuracy']:.3f}"
        )
    elif severity.get("note"):
        console.say(f"severity: {severity['note']}")
    for name, share in values["consistency"].items():
        console.say(f"{name.replace('_', ' ')}: {share:.3f} of the rows")
    control = values.get("prompt_only", {})
    if "auroc" in control:
        console.say(
            f"control, TF-IDF on the prompts alone: AUROC {control['auroc']:.3f}, AP {control['ap']:.3f}"
        )
    elif control:
        console.say(f"control, TF-IDF on the prompts alone: {control['note']}")
