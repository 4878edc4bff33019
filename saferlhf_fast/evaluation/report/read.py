"""What reports are made from: the files of a run folder, read without complaint about those that are missing.

A run: config.yaml (with `stage`), versions.json, summary.json, metrics.jsonl, and for PPO stages
evaluation_before.json and evaluation_after.json: lists of {prompt, response, reward, cost, kl, length}, where
a score may be null. Only metrics.jsonl must be there. Its names are those of saferlhf_fast.runtime.metrics;
gold/helpfulness, gold/cost and gold/unsafe_share are there where gold scores exist, eval/threshold is the
constraint's d.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ...errors import UserError


@dataclass(frozen=True)
class Run:
    """One run folder. A file that is missing is empty here."""

    folder: Path
    metrics: list = field(default_factory=list)  # rows of metrics.jsonl
    config: str = ""  # text of config.yaml
    stage: str = ""
    versions: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    before: list = field(default_factory=list)  # evaluation rows of the starting policy
    after: list = field(default_factory=list)  # and of the policy that was kept
    settings: dict = field(default_factory=dict)  # config.yaml as read

    def curve(self, name):
        """-> steps, values of a metric, finite ones only."""
        rows = [(row["step"], row[name]) for row in self.metrics if isinstance(row.get(name), (int, float))]
        return [s for s, _ in rows], [v for _, v in rows]

    def has(self, *names):
        """Tells whether any of these metrics has a finite value."""
        return any(isinstance(row.get(name), (int, float)) for row in self.metrics for name in names)

    @property
    def asks_training_prompts(self):
        """True where the recipe holds no prompts out for evaluation: ppo_lag.load_data takes the first
        training prompts then.
        """
        evaluation = self.settings.get("evaluation")
        return (
            isinstance(evaluation, dict) and evaluation.get("data") is None and not evaluation.get("fraction")
        )

    @property
    def threshold(self):
        """D in the cost model's units, or None without a constraint."""
        values = self.curve("eval/threshold")[1]
        return values[-1] if values else self.summary.get("threshold")


def read_run(folder):
    """A run folder -> Run."""
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


def read_lines(path):
    """Objects of a .jsonl file; a last line that was cut off in the middle of writing is left out."""
    path, rows = Path(path), []
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


def read_json(path, default):
    """Contents of a JSON file; `default` when it is not there."""
    text = _text(path)
    if not text:
        return default
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error


def _text(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
