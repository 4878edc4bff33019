"""The command `evaluate judge-calibration`: how often a judge agrees with people, before it judges models.

saferlhf-fast evaluate judge-calibration judge.base_url=URL judge.model=NAME data=PAIRS output=DIR

The pairs have people's labels of which answer is better (helpfulness) or safer (harmlessness), ties included.
Beside the agreement stands the floor: how often "the longer answer is better" agrees.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from saferlhf_fast.errors import UserError
from saferlhf_fast.version import __version__

from ...config.judge_settings import JudgeCalibrationConfig, Question
from ...config.load import to_dict
from ...data.counted_records import records_of, require_record
from ...data.records import Preference
from ...data.report import Report
from ...runtime import console, disk
from ..statistics import interval_text, share_interval
from .compare import JudgedPair, judge_pairs
from .protocol import VERSION, Pair
from .summary import win_rate
from .verdict_store import VerdictStore

LABELS = ("first", "second", "tie")
RESAMPLES = 1000

FILE = "calibration.json"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A pair and which answer people prefer."""

    pair: Pair
    labels: dict[Question, str]
    """Of LABELS, for the questions that people answered."""


def calibrate(cfg: JudgeCalibrationConfig) -> dict[str, Any]:
    """Asks a judge about pairs with people's labels, and writes and prints how often it agrees.

    Args:
        cfg: Settings of the command.

    Returns:
        What `calibration.json` holds.

    Raises:
        UserError: The data have no labels for the judge's questions, the output is of another calibration,
            or the endpoint refuses for good.
    """
    folder = Path(cfg.output).expanduser()
    settings = to_dict(cfg)
    _refuse_other(folder, settings)
    report = Report()
    labelled = read_labelled(cfg, report)
    with disk.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    stopped = spent = ""
    with VerdictStore(folder / "verdicts.sqlite") as store:
        for question in cfg.judge.questions:
            asked = [item for item in labelled if question in item.labels]
            judge = replace(cfg.judge, questions=[question])
            comparison = judge_pairs(judge, [item.pair for item in asked], store)
            stopped, spent = stopped or comparison.stopped, comparison.spent
            if asked:
                labels = [item.labels[question] for item in asked]
                found[question] = agreement(list(zip(comparison.judged, labels)), cfg.seed)
    result = {
        "judge": cfg.judge.model,
        "version": __version__,
        "protocol": VERSION,
        "settings": _identity(settings),
        "data": report.as_dict(),
        "questions": found,
        "stopped": stopped,
        "spent": spent,
    }
    disk.write_text(folder / FILE, json.dumps(result, indent=1))
    _show(result)
    return result


def read_labelled(cfg: JudgeCalibrationConfig, report: Report) -> list[Labelled]:
    """Reads pairs with people's labels.

    Args:
        cfg: Data, questions and seed.
        report: Gets the counts.

    Raises:
        UserError: A source has no pairs, or no pair has a label for one of the questions.
    """
    labelled = []
    for counts, records in records_of(cfg.data, cfg.seed, report):
        require_record(counts, Preference, "pairs of answers with labels")
        for record in records:
            labels = _labels(record, cfg.judge.questions)
            if labels:
                counts.kept += 1
                labelled.append(Labelled(_pair(record), labels))
            else:
                counts.drop("no label for the judge's questions", record.where)
    for line in report.lines():
        console.say(line)
    if not labelled:
        asked = ", ".join(cfg.judge.questions)
        raise UserError(f"data: expected pairs with people's labels of {asked}, got none")
    return labelled


def _labels(record: Preference, questions: Sequence[Question]) -> dict[Question, str]:
    better = "tie" if record.tie else None if record.better is None else LABELS[record.better]
    safer = None if record.safer is None else LABELS[record.safer]
    known: dict[Question, str | None] = {"helpfulness": better, "harmlessness": safer}
    return {question: label for question in questions if (label := known[question]) is not None}


def _pair(record: Preference) -> Pair:
    turns = [f"{message['role']}: {message['content']}" for message in record.messages]
    prompt = record.messages[0]["content"] if len(turns) == 1 else "\n\n".join(turns)
    return Pair(record.where, prompt, *record.responses)


def agreement(rows: Sequence[tuple[JudgedPair, str]], seed: int) -> dict[str, Any]:
    """How often a judge agrees with people's labels.

    Args:
        rows: Judged pairs and the label of each, first, second or tie.
        seed: Seed of the resampled interval.

    Returns:
        `agreement` over all pairs with a verdict, `agreement_without_ties` over those that people did not
        call ties, `longer_wins` (the floor, on the latter), each with a Wilson interval; `kappa`, Cohen's,
        with a bootstrap interval; and what `summary.win_rate` tells of the judge.
    """
    done = [(pair, label) for pair, label in rows if pair.outcome is not None]
    decided = [(pair, label) for pair, label in done if label != "tie"]
    people = np.array([LABELS.index(label) for _, label in done], dtype=np.int64)
    judge = np.array([LABELS.index(pair.outcome) for pair, _ in done if pair.outcome], dtype=np.int64)
    lengths = [len(pair.pair.first) - len(pair.pair.second) for pair, _ in decided]
    longer = [
        None if length == 0 else (length > 0) == (label == "first")
        for length, (_, label) in zip(lengths, decided)
    ]
    return {
        "agreement": {**share_interval([p.outcome == label for p, label in done]), "method": "Wilson"},
        "agreement_without_ties": {
            **share_interval([p.outcome == label for p, label in decided]),
            "method": "Wilson",
        },
        "kappa": _resampled(people, judge, seed),
        "longer_wins": {**share_interval(longer), "method": "Wilson"},
        **{name: value for name, value in win_rate([p for p, _ in rows]).items() if name != "win_rate"},
    }


Places = npt.NDArray[np.int64]


def kappa(people: Places, judge: Places) -> float:
    """Cohen's kappa of two lists of LABELS' places; NaN where both say one and the same throughout.

    scikit-learn's takes a millisecond a call, and the interval needs a thousand calls.
    """
    counts = np.bincount(people * len(LABELS) + judge, minlength=len(LABELS) ** 2).reshape(len(LABELS), -1)
    shares = counts / counts.sum()
    by_chance = float(shares.sum(axis=0) @ shares.sum(axis=1))
    return float("nan") if by_chance == 1 else float(np.trace(shares) - by_chance) / (1 - by_chance)


def _resampled(people: Places, judge: Places, seed: int) -> dict[str, Any]:
    """Kappa with its percentile interval over resampled pairs."""
    n = len(people)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0, "method": "bootstrap"}
    draw = np.random.default_rng(seed)
    values = [kappa(people[taken], judge[taken]) for taken in draw.integers(0, n, (RESAMPLES, n))]
    mean = kappa(people, judge)
    finite = np.array([value for value in values if np.isfinite(value)])
    low, high = np.quantile(finite, [0.025, 0.975]) if finite.size and np.isfinite(mean) else (None, None)
    return {
        "mean": mean if np.isfinite(mean) else None,
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
        "n": n,
        "method": f"bootstrap of pairs, {RESAMPLES}",
    }


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two calibrations the same one: limits and speed may change between starts."""
    judge = {
        name: settings["judge"][name] for name in ("base_url", "model", "questions", "max_answer_tokens")
    }
    return {"judge": judge, "data": settings["data"], "seed": settings["seed"]}


def _refuse_other(folder: Path, settings: dict[str, Any]) -> None:
    """Raises UserError where the folder holds the calibration of another judge or other data."""
    file = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: expected a folder, got the file {folder}")
    if not file.is_file():
        return
    try:
        before = json.loads(file.read_text())["settings"]
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise UserError(f"output: {file} cannot be read ({type(e).__name__}); name another folder") from None
    if before != json.loads(json.dumps(_identity(settings))):
        raise UserError(
            f"output: {folder} holds the calibration of another judge, data or seed; name another folder"
        )


def _show(result: dict[str, Any]) -> None:
    for question, values in result["questions"].items():
        table = [
            [name.replace("_", " "), interval_text(value), value["n"], value["method"]]
            for name, value in values.items()
            if isinstance(value, dict) and "mean" in value
        ]
        console.result_table(
            f"{result['judge']}: {question}", ["measure", "95 % interval", "n", "method"], table
        )
        for reason, count in values["missing"].items():
            console.say(f"missing: {count} × {reason}")
        if values["warning"]:
            console.warn(f"{question}: {values['warning']}")
    console.say(f"spent: {result['spent']}")
    if result["stopped"]:
        console.warn(f"stopped: {result['stopped']}; the same command goes on")
