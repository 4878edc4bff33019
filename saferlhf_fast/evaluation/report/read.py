"""What reports are made from: the files of a run folder. Files that are missing count as empty.

A run has config.yaml (with `stage`), versions.json, summary.json, metrics.jsonl and, for PPO stages,
evaluation_before.json and evaluation_after.json: lists of {prompt, response, reward, cost, kl, length}, where
a score may be null. Only metrics.jsonl must exist. Its names are those of saferlhf_fast.runtime.metrics;
gold/helpfulness, gold/cost and gold/unsafe_share are there where gold scores exist; eval/threshold is the
constraint's d.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import UserError

Curve = tuple[list[int], list[float]]
"""Steps and values, of one length."""


@dataclass(frozen=True)
class Run:
    """The contents of one run folder. A missing file is empty here."""

    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)  # rows of metrics.jsonl
    config: str = ""  # text of config.yaml
    stage: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    before: list[dict[str, Any]] = field(default_factory=list)  # evaluation rows of the starting policy
    after: list[dict[str, Any]] = field(default_factory=list)  # evaluation rows of the kept policy
    settings: dict[str, Any] = field(default_factory=dict)  # config.yaml as a dict

    def curve(self, name: str) -> Curve:
        """Steps and finite values of a metric."""
        rows = [(row["step"], row[name]) for row in self.metrics if isinstance(row.get(name), (int, float))]
        return [s for s, _ in rows], [v for _, v in rows]

    def has(self, *names: str) -> bool:
        """True when any of these metrics has a finite value."""
        return any(isinstance(row.get(name), (int, float)) for row in self.metrics for name in names)

    @property
    def evaluates_on_training_prompts(self) -> bool:
        """True where the evaluation prompts are training prompts, because the recipe holds none out."""
        evaluation = self.settings.get("evaluation")
        return (
            isinstance(evaluation, dict) and evaluation.get("data") is None and not evaluation.get("fraction")
        )

    @property
    def threshold(self) -> float | None:
        """The threshold d, in cost model units; None without a constraint."""
        values = self.curve("eval/threshold")[1]
        return values[-1] if values else self.summary.get("threshold")


def read_run(folder: str | Path) -> Run:
    """Reads a run folder.

    Raises:
        UserError: If metrics.jsonl is missing, or a file is damaged.
    """
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: expected the metrics of a run, found no such file")
    config = _text(folder / "config.yaml")
    settings = yaml.safe_load(config) if config else {}
    settings = settings if isinstance(settings, dict) else {}
    stage = settings.get("stage")
    return Run(
        folder,
        read_lines(path),
        config,
        stage or folder.name,
        read_json(folder / "versions.json", {}),
        read_json(folder / "summary.json", {}),
        read_json(folder / "evaluation_before.json", []),
        read_json(folder / "evaluation_after.json", []),
        settings,
    )


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file; none where there is no file.

    A last line that was cut off while it was written is left out.

    Raises:
        UserError: If another line is no JSON.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}") from error
        rows.append(row)
    return rows


def read_json(path: Path, default: Any) -> Any:
    """Contents of a JSON file; `default` where there is no file or an empty one.

    Args:
        path: The file.
        default: What is returned where there is no file or an empty one.

    Raises:
        UserError: If the file is no JSON.
    """
    text = _text(path)
    if not text:
        return default
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
