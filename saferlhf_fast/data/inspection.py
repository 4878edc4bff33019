"""Inspects labelled rows in one pass: counts, tables, duplicates, contradictions, lengths, overlap.

Texts are not kept: duplicates are found by 64-bit hashes, lengths come from a random sample of rows.
"""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saferlhf_fast.data.hash_columns import HashColumn
from saferlhf_fast.data.labelled import LABEL_SETS, Answer, LabelledRow

SAMPLE = 20_000
"""Rows whose lengths are measured."""

_MOST_KINDS = 200_000  # label combinations that are counted apart before they are summed up

Label = tuple[str, tuple[bool | None, ...], int | None, bool | None, bool | None]
"""(label set, flags, severity, unsafe, refusal)"""


@dataclass
class LabelTable:
    """Counts of labels of answers, or of prompts."""

    total: int = 0
    unsafe: Counter[bool | None] = field(default_factory=Counter)
    severity: Counter[int | None] = field(default_factory=Counter)
    refusal: Counter[bool | None] = field(default_factory=Counter)
    categories: dict[str, dict[str, Counter[int | None]]] = field(default_factory=dict)
    """{label set: {category: {severity: answers that it applies to}}}"""
    unknown: dict[str, Counter[str]] = field(default_factory=dict)
    """{label set: {category: answers for which it is unknown}}"""
    disagreements: Counter[str] = field(default_factory=Counter)
    """Answers whose own labels contradict each other, by kind."""
    _kinds: Counter[Label] = field(default_factory=Counter)

    def add(self, answer: Answer) -> None:
        """Counts the labels of one text."""
        kind = answer.label_set, answer.categories, answer.severity, answer.unsafe, answer.refusal
        self._kinds[kind] += 1
        if len(self._kinds) > _MOST_KINDS:
            self.sum_up()

    def sum_up(self) -> None:
        """Brings the tables up to date."""
        for (label_set, flags, severity, unsafe, refusal), n in self._kinds.items():
            self.total += n
            self.unsafe[unsafe] += n
            self.severity[severity] += n
            self.refusal[refusal] += n
            names = LABEL_SETS.get(label_set, ())
            table = self.categories.setdefault(label_set, {name: Counter() for name in names})
            unknown = self.unknown.setdefault(label_set, Counter())
            for name, flag in zip(names, flags):
                if flag:
                    table[name][severity] += n
                elif flag is None:
                    unknown[name] += n
            for text in _disagreements(unsafe, severity, flags):
                self.disagreements[text] += n
        self._kinds.clear()


def _disagreements(unsafe: bool | None, severity: int | None, flags: tuple[bool | None, ...]) -> list[str]:
    """Returns how the labels of one answer contradict each other."""
    known_none = bool(flags) and not any(flags) and None not in flags
    checks = {
        "safe with severity > 0": unsafe is False and bool(severity),
        "safe with a category": unsafe is False and any(flags),
        "unsafe without category": unsafe is True and known_none,
        "unsafe with severity 0": unsafe is True and severity == 0,
    }
    return [text for text, holds in checks.items() if holds]


class Inspector:
    """Sees each row once."""

    def __init__(
        self,
        measure: Callable[[list[str]], list[int]] | None = None,
        all_lengths: bool = False,
        seed: int = 0,
    ) -> None:
        """Starts with nothing counted.

        Args:
            measure: Texts -> their lengths; None: characters.
            all_lengths: Measure every row, not a sample of SAMPLE rows.
            seed: Seed of the sample.
        """
        self.rows = self.both_labels = self.agreeing = self.empty_answers = 0
        self.answers, self.prompts = LabelTable(), LabelTable()
        self.answers_per_row: Counter[int] = Counter()
        self.row_hashes, self.prompt_hashes, self.answer_hashes = HashColumn(), HashColumn(), HashColumn()
        self.labelled_hashes = HashColumn()
        self._measure = measure or (lambda texts: [len(text) for text in texts])
        self._all, self._random = all_lengths, random.Random(f"lengths/{seed}")
        self._sample: list[tuple[str, ...]] = []
        self._lengths = array("L"), array("L")

    def add(self, found: Iterable[LabelledRow]) -> None:
        """Counts one row of a file."""
        for item in found:
            self._add(item)

    def _add(self, item: LabelledRow) -> None:
        self.rows += 1
        self.answers_per_row[len(item.answers)] += 1
        prompt = item.prompt
        texts = (prompt, *[answer.text for answer in item.answers])
        self.prompt_hashes.append(hash(prompt))
        label = item.prompt_label
        # labels of the prompt belong to the row where it has no answers
        self.row_hashes.append(hash(texts))
        for answer in item.answers:
            self.answers.add(answer)
            key = hash((prompt, answer.text))
            self.answer_hashes.append(key)
            if answer.unsafe is not None:
                self.labelled_hashes.append(key << 1 | answer.unsafe)
            if not answer.text.strip():
                self.empty_answers += 1
        if label:
            self.prompts.add(label)
        if item.better is not None and item.safer is not None:
            self.both_labels += 1
            self.agreeing += item.better == item.safer
        self._draw(texts)

    def _draw(self, texts: tuple[str, ...]) -> None:
        """Keeps a row for the lengths: each row with the same probability (reservoir sampling)."""
        if len(self._sample) < SAMPLE:
            self._sample.append(texts)
        elif self._all:
            self._measure_sample()
            self._sample.append(texts)
        else:
            place = int(self._random.random() * self.rows)
            if place < SAMPLE:
                self._sample[place] = texts

    def _measure_sample(self) -> None:
        prompts, answers = self._lengths
        prompts.extend(self._measure([texts[0] for texts in self._sample]))
        answers.extend(self._measure([text for texts in self._sample for text in texts[1:]]))
        self._sample.clear()

    def result(self, unit: str = "characters") -> dict[str, Any]:
        """Returns everything that was counted, as JSON can hold it.

        Args:
            unit: What `measure` counts.
        """
        for table in (self.answers, self.prompts):
            table.sum_up()
        measured = self.rows if self._all else len(self._sample)
        self._measure_sample()
        pairs, answers = self.labelled_hashes.contradictions()
        return {
            "rows": self.rows,
            "answers_per_row": {str(key): n for key, n in sorted(self.answers_per_row.items())},
            "answers": _as_json(self.answers),
            "prompts": _as_json(self.prompts),
            "empty_answers": self.empty_answers,
            "better_is_safer": {"rows": self.both_labels, "agree": self.agreeing},
            "duplicates": {
                "rows": self.row_hashes.repeated(),
                "prompts": self.prompt_hashes.repeated(),
                "distinct_prompts": self.prompt_hashes.distinct(),
                "answers": self.answer_hashes.repeated(),
            },
            "contradictions": {
                "labelled_both_ways": pairs,
                "labelled_both_ways_answers": answers,
                **{text: n for text, n in self.answers.disagreements.items()},
            },
            "lengths": {
                "unit": unit,
                "rows": measured,
                "sampled": not self._all and measured < self.rows,
                **{name: _percentiles(values) for name, values in zip(("prompt", "answer"), self._lengths)},
            },
        }

    def overlap(self, other: "Inspector") -> dict[str, int]:
        """Returns how many of these rows and answers another source has too, by prompt and by answer.

        Args:
            other: What saw the other source, in the same process: hashes differ from process to process.
        """
        prompts, answers = other.prompt_hashes.unique(), other.answer_hashes.unique()
        return {
            "rows_with_a_shared_prompt": self.prompt_hashes.found_in(prompts),
            "shared_answers": self.answer_hashes.found_in(answers),
            "rows_of_the_other": other.rows,
        }


def _as_json(table: LabelTable) -> dict[str, Any]:
    names = {True: "yes", False: "no", None: "unknown"}
    return {
        "total": table.total,
        "unsafe": {names[key]: n for key, n in table.unsafe.items()},
        "severity": {str(key) if key is not None else "unknown": n for key, n in table.severity.items()},
        "refusal": {names[key]: n for key, n in table.refusal.items()},
        "categories": {
            label_set: {
                name: {
                    "total": counts.total(),
                    **{"unknown" if key is None else str(key): n for key, n in counts.items()},
                    "label_unknown": table.unknown[label_set][name],
                }
                for name, counts in categories.items()
            }
            for label_set, categories in table.categories.items()
            if categories
        },
    }


def _percentiles(values: "array[int]") -> dict[str, float]:
    if not values:
        return {}
    lengths = np.frombuffer(values, np.dtype(f"u{values.itemsize}"))
    points = {"min": 0, "p5": 5, "median": 50, "p95": 95, "p99": 99, "max": 100}
    return {"n": len(lengths), "mean": float(lengths.mean())} | {
        name: float(np.percentile(lengths, point, method="lower")) for name, point in points.items()
    }
