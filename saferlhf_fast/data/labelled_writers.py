"""Writes labelled rows in another form, and says what that form does not hold.

A row that a form cannot hold is CannotHold with the reason; a label that is left out, or whose category has
no exact counterpart, is counted. Nothing is guessed: an unknown label is written as null, or its row is not
written where the form has no place for "unknown".
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from saferlhf_fast.data.harm_taxonomy import BEAVERTAILS, COUNTERPARTS, PKU, round_trip, translate
from saferlhf_fast.data.labelled import LABEL_SETS, Answer, LabelledRow
from saferlhf_fast.data.records import assistant, user

Fields = dict[str, Any]


class CannotHold(Exception):
    """The form has no place for a row; the text is the reason, equal for equal reasons."""


class FormWriter:
    """Writes rows in one form and counts what is lost."""

    def __init__(self, form: str, by: str = "better") -> None:
        """Prepares.

        Args:
            form: A key of WRITERS.
            by: With PREFERENCES: the label that decides, better or safer.
        """
        self.form, self.by = form, by
        self.lost: Counter[str] = Counter()
        """What the form does not hold -> labels of the rows that were written."""
        self.forth: Counter[str] = Counter()
        """Category labels of the rows that were written, by what their translation does to them."""
        self.back: Counter[str] = Counter()
        """The same for the way back, of the labels that were written."""
        self._write, holds = WRITERS[form]
        self._holds = (holds - {"better"}) | {by} if form in PREFERENCES else holds
        self.pending: list[tuple[Counter[str], str]] = []
        """What is counted when the row is written."""

    def rows(self, item: LabelledRow) -> list[Fields]:
        """Returns the rows of the form, often one.

        Args:
            item: What was read.

        Raises:
            CannotHold: The form has no place for it.
        """
        self.pending.clear()
        rows = self._write(self, item)
        for counts, fate in self.pending:  # of a row that is written, not of one that turned out not to fit
            counts[fate] += 1
        for answer in item.answers:
            for name in ("severity", "refusal", "unsafe"):
                if name not in self._holds and getattr(answer, name) is not None:
                    self.lost[name] += 1
            if "categories" not in self._holds and answer.names():
                self.lost["categories"] += 1
        for name in ("better", "safer"):
            if name not in self._holds and getattr(item, name) is not None:
                self.lost[name] += 1
        if item.prompt_label and "prompt_label" not in self._holds:
            self.lost["labels of the prompt"] += 1
        if item.answers and "answers" not in self._holds:
            self.lost["answers"] += len(item.answers)
        return rows

    def flags(self, answer: Answer, target: str) -> dict[str, bool | None] | None:
        """Returns the flags of an answer in another label set; None where its categories are unknown."""
        names, source = LABEL_SETS[target], answer.label_set
        if not source or not answer.categories:
            return dict.fromkeys(names, False) if answer.unsafe is False and answer.severity == 0 else None
        if source == target:
            return dict(zip(names, answer.categories))
        given = answer.names()
        if (source, target) not in COUNTERPARTS:
            raise CannotHold(f"no table from the categories of {source} to those of {target}")
        result = translate(given, source, target)
        self._count(self.forth, given, source, target)
        self._count(self.back, result.categories, target, source)
        unknown = {name for name, flag in zip(LABEL_SETS[source], answer.categories) if flag is None}
        doubtful = {other for name in unknown for other in COUNTERPARTS[source, target][name]}
        return {
            name: True if name in result.categories else None if name in doubtful else False for name in names
        }

    def _count(self, counts: Counter[str], given: tuple[str, ...], source: str, target: str) -> None:
        for name in given:
            back = round_trip(name, source, target)
            fate = "exact" if back == (name,) else "widened" if back else "without counterpart"
            self.pending += [(counts, "labels"), (counts, fate)]


def _two(item: LabelledRow) -> tuple[Answer, Answer]:
    if len(item.answers) != 2:
        raise CannotHold(f"expected 2 answers, got {len(item.answers)}")
    return item.answers[0], item.answers[1]


def _known(value: Any, what: str) -> Any:
    if value is None:
        raise CannotHold(f"{what} is unknown")
    return value


def _dual(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    answers = _two(item)
    fields: Fields = {"prompt": item.prompt}
    for i, answer in enumerate(answers):
        flags = _known(writer.flags(answer, "pku"), "a harm category")
        fields |= {
            f"response_{i}": answer.text,
            f"response_{i}_source": answer.source,
            f"is_response_{i}_safe": not _known(answer.unsafe, "whether an answer is unsafe"),
            f"response_{i}_harm_category": flags,
            f"response_{i}_severity_level": _known(answer.severity, "a severity"),
            f"response_{i}_sha256": answer.sha256,
        }
    fields["prompt_source"] = item.prompt_source
    fields["better_response_id"] = _known(item.better, "which answer is better")
    fields["safer_response_id"] = _known(item.safer, "which answer is safer")
    return [fields]


def _v0(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    answers = _two(item)
    return [
        {
            "prompt": item.prompt,
            **{f"response_{i}": answer.text for i, answer in enumerate(answers)},
            **{
                f"is_response_{i}_safe": not _known(answer.unsafe, "whether an answer is unsafe")
                for i, answer in enumerate(answers)
            },
            "better_response_id": _known(item.better, "which answer is better"),
            "safer_response_id": _known(item.safer, "which answer is safer"),
        }
    ]


def _single(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    answers = _two(item)
    return [
        {
            "prompt": item.prompt,
            **{f"response_{i}": answer.text for i, answer in enumerate(answers)},
            "prompt_source": item.prompt_source,
            **{f"response_{i}_source": answer.source for i, answer in enumerate(answers)},
            "better_response_id": _preferred(writer, item),
            **{f"response_{i}_sha256": answer.sha256 for i, answer in enumerate(answers)},
        }
    ]


def _preferred(writer: FormWriter, item: LabelledRow) -> int:
    return int(_known(getattr(item, writer.by), f"which answer is {writer.by}"))


def _safe_over_unsafe(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    flags = [answer.unsafe for answer in _two(item)]
    if sorted(map(str, flags)) != ["False", "True"]:
        raise CannotHold("not one safe and one unsafe answer")
    safe = flags.index(False)
    return [
        {
            "prompt": item.prompt,
            "safe_response": item.answers[safe].text,
            "unsafe_response": item.answers[1 - safe].text,
        }
    ]


def _each(
    fields: Callable[[FormWriter, LabelledRow, Answer], Fields],
) -> Callable[[FormWriter, LabelledRow], list[Fields]]:
    """Makes a writer of a row for each answer."""

    def write(writer: FormWriter, item: LabelledRow) -> list[Fields]:
        if not item.answers:
            raise CannotHold("no answer")
        return [fields(writer, item, answer) for answer in item.answers]

    return write


def _qa(writer: FormWriter, item: LabelledRow, answer: Answer) -> Fields:
    return {
        "prompt": item.prompt,
        "response": answer.text,
        "is_safe": not _known(answer.unsafe, "whether an answer is unsafe"),
        "harm_category": writer.flags(answer, "pku"),
        "severity_level": answer.severity,
        "prompt_source": item.prompt_source,
        "response_source": answer.source,
        "sha256": answer.sha256,
    }


def _qa_early(writer: FormWriter, item: LabelledRow, answer: Answer) -> Fields:
    severity = _known(answer.severity, "a severity")
    flags = _known(writer.flags(answer, "pku"), "a harm category")
    if None in flags.values():
        raise CannotHold("a harm category is unknown")
    if _known(answer.unsafe, "whether an answer is unsafe") != (severity > 0):
        raise CannotHold("severity and safety contradict each other")
    return {
        "prompt": item.prompt,
        "response_source": answer.source,
        "severity_category": severity,
        "safety_category": [int(flags[name]) for name in PKU],
        "response": answer.text,
        "prompt_source": item.prompt_source,
        "sha256": answer.sha256,
    }


def _beavertails(writer: FormWriter, item: LabelledRow, answer: Answer) -> Fields:
    return {
        "prompt": item.prompt,
        "response": answer.text,
        "category": _known(writer.flags(answer, "beavertails"), "a harm category"),
        "is_safe": not _known(answer.unsafe, "whether an answer is unsafe"),
    }


def _cs_rlhf(writer: FormWriter, item: LabelledRow, answer: Answer) -> Fields:
    unsafe = _known(answer.unsafe, "whether an answer is unsafe")
    return {"prompt": item.prompt, "response": answer.text, "label": "Unsafe" if unsafe else "Safe"}


def _moderation(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    texts = item.answers or ((item.prompt_label,) if item.prompt_label else ())
    if not texts:
        raise CannotHold("no answer and no label")
    return [
        {
            "prompt": item.prompt,
            "response": text.text,
            "unsafe": text.unsafe,
            "categories": dict(zip(LABEL_SETS.get(text.label_set, ()), text.categories)),
            "severity": text.severity,
            "refusal": text.refusal,
            "source": text.source,
            "label_set": text.label_set,
        }
        for text in texts
    ]


def _openai(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    label = item.prompt_label
    if label is None or label.label_set != "openai-letters":
        raise CannotHold("the prompt has none of OpenAI's labels")
    known = zip(LABEL_SETS["openai-letters"], label.categories)
    return [{"prompt": item.prompt} | {name: int(flag) for name, flag in known if flag is not None}]


def _evaluation(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    label = item.prompt_label
    if label is None or label.label_set != "beavertails" or len(label.names()) != 1:
        raise CannotHold("the prompt has not one category of BeaverTails")
    name = label.names()[0]
    return [{"prompt": item.prompt, "category": name, "category_id": BEAVERTAILS.index(name)}]


def _prompt(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    return [{"prompt": item.prompt} | ({"prompt_source": item.prompt_source} if item.prompt_source else {})]


def _trl_preference(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    answers = _two(item)
    chosen = _preferred(writer, item)
    return [
        {
            "prompt": [user(item.prompt)],
            "chosen": [assistant(answers[chosen].text)],
            "rejected": [assistant(answers[1 - chosen].text)],
        }
    ]


def _trl_messages(writer: FormWriter, item: LabelledRow) -> list[Fields]:
    """One dialogue to imitate: of two answers the preferred one."""
    if not item.answers:
        raise CannotHold("no answer")
    answers = item.answers
    if len(answers) == 2 and (item.better is not None or item.safer is not None):
        answers = (answers[_preferred(writer, item)],)
        writer.pending.append((writer.lost, "answers that are not preferred"))
    return [{"messages": [user(item.prompt), assistant(answer.text)]} for answer in answers]


PREFERENCES = ("single", "trl-preference", "trl-messages")
"""Forms with one preference, which `by` chooses."""

_HARM = {"answers", "unsafe", "categories", "severity"}
WRITERS: dict[str, tuple[Callable[[FormWriter, LabelledRow], list[Fields]], set[str]]] = {
    "dual": (_dual, _HARM | {"better", "safer"}),
    "v0": (_v0, {"answers", "unsafe", "better", "safer"}),
    "single": (_single, {"answers", "better"}),
    "safe-over-unsafe": (_safe_over_unsafe, {"answers", "unsafe", "safer"}),
    "qa": (_each(_qa), _HARM),
    "qa-early": (_each(_qa_early), _HARM),
    "beavertails": (_each(_beavertails), {"answers", "unsafe", "categories"}),
    "cs-rlhf": (_each(_cs_rlhf), {"answers", "unsafe"}),
    "moderation": (_moderation, _HARM | {"refusal", "prompt_label"}),
    "openai": (_openai, {"prompt_label"}),
    "beavertails-evaluation": (_evaluation, {"prompt_label"}),
    "prompts": (_prompt, set()),
    "trl-preference": (_trl_preference, {"answers", "better"}),
    "trl-messages": (_trl_messages, {"answers"}),
}
"""Form -> (its writer, what it holds)."""
