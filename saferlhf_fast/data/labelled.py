"""Labelled rows: a prompt, its answers, and every label that the public safety data sets give them.

One reader per form; LABELLED_FORMS is the table, detected from the columns, the most specific form first. A
row in none of these forms is read by formats.py and has no labels of harm. A label that is missing or null is
unknown, never "no". Writing a form: labelled_writers.py. docs/data.md shows the columns.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from saferlhf_fast.data.files import Row, describe
from saferlhf_fast.data.harm_taxonomy import BEAVERTAILS, DO_NOT_ANSWER, PKU, TAXONOMIES
from saferlhf_fast.data.records import (
    UNKNOWN,
    UNSAFE,
    HarmLabel,
    LabelFault,
    as_flag,
    choice_field,
    harm_label,
    text_field,
)
from saferlhf_fast.errors import UserError

OPENAI_LETTERS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
"""The labels of OpenAI's moderation data set."""

LABEL_SETS = {**TAXONOMIES, "openai-letters": OPENAI_LETTERS}
"""Name of a label set -> its categories."""


class Answer(NamedTuple):
    """A judged text and its labels; None: unknown."""

    text: str
    unsafe: bool | None = None
    categories: tuple[bool | None, ...] = ()
    """One flag for each category of the label set, in its order; () where no category is labelled."""
    label_set: str = ""
    """A key of LABEL_SETS."""
    severity: int | None = None
    refusal: bool | None = None
    source: str = ""
    """The model that wrote it."""
    sha256: str | None = None
    """As the file has it."""

    def names(self) -> tuple[str, ...]:
        """Returns the categories that apply."""
        return tuple(name for name, flag in zip(LABEL_SETS.get(self.label_set, ()), self.categories) if flag)


class LabelledRow(NamedTuple):
    """What one row says about a prompt and its answers."""

    prompt: str
    answers: tuple[Answer, ...] = ()
    better: int | None = None
    """Which answer helps more."""
    safer: int | None = None
    """Which answer is safer."""
    prompt_source: str = ""
    prompt_label: Answer | None = None
    """Labels of the prompt itself; its text is empty."""


@dataclass(frozen=True, slots=True)
class LabelledForm:
    """How a form is detected and read."""

    columns: tuple[str, ...]
    """It is this form when a source has all of these columns."""
    read: Callable[[Row], LabelledRow]
    any_of: tuple[str, ...] = ()
    """And at least one of these, where there are any."""


def form_of_columns(columns: Collection[str]) -> str | None:
    """Returns the name of the form with these columns; None where no labelled form has them."""
    for name, form in LABELLED_FORMS.items():
        if all(column in columns for column in form.columns) and (
            not form.any_of or any(column in columns for column in form.any_of)
        ):
            return name
    return None


def read_labelled(row: Row, form: str) -> LabelledRow:
    """Reads a row.

    Args:
        row: The row.
        form: A key of LABELLED_FORMS.

    Raises:
        UserError: A field is missing or has an impossible value; its text begins with the row's place.
    """
    try:
        return LABELLED_FORMS[form].read(row)
    except LabelFault as fault:
        raise UserError(f"{row.where}: {fault}") from fault


def _text(row: Row, name: str) -> str:
    """Returns an optional text, such as the name of a source; "" where there is none."""
    value = row.fields.get(name)
    return value if isinstance(value, str) else ""


def _from_label(text: str, label: HarmLabel, source: str = "", sha256: str | None = None) -> Answer:
    unsafe = None if label.sign == UNKNOWN else label.sign == UNSAFE
    return Answer(text, unsafe, label.categories, label.taxonomy or "", label.severity, None, source, sha256)


def _quick_label(row: Row, safe: str, categories: str, severity: str, taxonomy: str) -> HarmLabel:
    """As `harm_label`, quicker for a label that has all its parts as the data sets write them."""
    fields = row.fields
    flags, level, is_safe = fields.get(categories), fields.get(severity), fields.get(safe)
    names = TAXONOMIES[taxonomy]
    if flags is None and level is None and type(is_safe) is bool:
        return _UNGRADED[is_safe]
    if type(flags) is dict and len(flags) == len(names) and type(is_safe) is bool:
        try:
            values = tuple([flags[name] for name in names])
        except KeyError:
            return harm_label(row, safe, categories, severity, taxonomy)
        whole = level is None or (type(level) is int and 0 <= level <= 3)
        if whole and {*map(type, values)} == {bool}:
            return HarmLabel(-UNSAFE if is_safe else UNSAFE, level, taxonomy, values)
    if isinstance(flags, list):  # names of the categories that apply: the others do not
        if all(isinstance(name, str) for name in flags):
            given = dict.fromkeys(names, False) | dict.fromkeys(flags, True)
            row = Row({**fields, categories: given}, row.where, row.untyped)
    return harm_label(row, safe, categories, severity, taxonomy)


_UNGRADED = {True: HarmLabel(-UNSAFE), False: HarmLabel(UNSAFE)}


def _side(row: Row, name: str) -> int | None:
    """Returns the optional label of which answer is better or safer."""
    value = row.fields.get(name)
    if value is None or (type(value) is int and value in (0, 1)):
        return value
    return choice_field(row, name, (0, 1))


_PAIR_COLUMNS = tuple(
    (
        f"response_{i}",
        f"is_response_{i}_safe",
        f"response_{i}_harm_category",
        f"response_{i}_severity_level",
        f"response_{i}_source",
        f"response_{i}_sha256",
    )
    for i in (0, 1)
)


def _pair(row: Row) -> LabelledRow:
    fields = row.fields
    answers = tuple(
        [
            _from_label(
                text_field(row, text),
                _quick_label(row, safe, categories, severity, "pku"),
                _text(row, source),
                fields.get(sha256),
            )
            for text, safe, categories, severity, source, sha256 in _PAIR_COLUMNS
        ]
    )
    better, safer = _side(row, "better_response_id"), _side(row, "safer_response_id")
    return LabelledRow(text_field(row, "prompt"), answers, better, safer, _text(row, "prompt_source"))


def _safe_over_unsafe(row: Row) -> LabelledRow:
    safe, unsafe = text_field(row, "safe_response"), text_field(row, "unsafe_response")
    return LabelledRow(text_field(row, "prompt"), (Answer(safe, False), Answer(unsafe, True)), safer=0)


def _answered(row: Row, label: HarmLabel) -> LabelledRow:
    answer = _from_label(
        text_field(row, "response"), label, _text(row, "response_source"), row.fields.get("sha256")
    )
    return LabelledRow(text_field(row, "prompt"), (answer,), prompt_source=_text(row, "prompt_source"))


def _qa(row: Row) -> LabelledRow:
    return _answered(row, _quick_label(row, "is_safe", "harm_category", "severity_level", "pku"))


def _beavertails(row: Row) -> LabelledRow:
    severity = "severity_level" if "severity_level" in row.fields else "severity"
    return _answered(row, _quick_label(row, "is_safe", "category", severity, "beavertails"))


def _qa_early(row: Row) -> LabelledRow:
    """PKU-SafeRLHF-QA's first revision: severity_category 0 to 3, safety_category a list of whole numbers.

    19 numbers of 0 and 1 are flags in the card's order; other lists hold the card's numbers, 1 to 19, and [0]
    or [] for none.
    """
    numbers = row.fields.get("safety_category")
    if numbers is None:
        return _answered(row, _derived(row, None))
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise LabelFault("field 'safety_category' is not a list of whole numbers")
    if len(numbers) == len(PKU) and {*numbers} <= {0, 1}:
        return _answered(row, _derived(row, tuple(number == 1 for number in numbers)))
    if not all(0 <= number <= len(PKU) for number in numbers) or (0 in numbers and len(numbers) > 1):
        raise LabelFault(f"field 'safety_category' has numbers that are not 1 to {len(PKU)}, or 0 alone")
    return _answered(row, _derived(row, tuple(i + 1 in numbers for i in range(len(PKU)))))


def _derived(row: Row, flags: tuple[bool, ...] | None) -> HarmLabel:
    """The label of a row that has a severity and no is_safe: severity 0 is safe."""
    level = harm_label(row, "", "", "severity_category", "pku").severity
    sign = UNKNOWN if level is None else UNSAFE if level else -UNSAFE
    return HarmLabel(sign, level, "pku" if flags else None, flags or ())


def is_cs_rlhf(row: Row) -> bool:
    """Tells whether a row's label is CS_RLHF's, and not that of another data set with this column."""
    return str(row.fields.get("label")).strip().lower() in ("safe", "unsafe")


def _cs_rlhf(row: Row) -> LabelledRow:
    word = row.fields["label"] if "label" in row.fields else None
    unsafe = {"safe": False, "unsafe": True}.get(str(word).strip().lower())
    if unsafe is None and word is not None:
        raise UserError(f"{row.where}, field 'label': expected Safe or Unsafe, got {describe(word)}")
    return LabelledRow(text_field(row, "prompt"), (Answer(text_field(row, "response"), unsafe),))


def _openai(row: Row) -> LabelledRow:
    flags = []
    for name in OPENAI_LETTERS:
        value = row.fields.get(name)
        flag = as_flag(row, value)
        if flag is None and value is not None and not (row.untyped and not str(value).strip()):
            raise UserError(f"{row.where}, field '{name}': expected 0 or 1, got {describe(value)}")
        flags.append(flag)
    label = Answer("", categories=tuple(flags), label_set="openai-letters")
    return LabelledRow(text_field(row, "prompt"), prompt_label=label)


_REFUSALS = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": True}


def _xstest(row: Row) -> LabelledRow:
    word = text_field(row, "final_label", "").strip()
    if word and word not in _REFUSALS:
        raise UserError(
            f"{row.where}, field 'final_label': expected {', '.join(_REFUSALS)}, got {describe(word)}"
        )
    answer = Answer(text_field(row, "completion"), refusal=_REFUSALS.get(word))
    return LabelledRow(text_field(row, "prompt"), (answer,))


def _do_not_answer(row: Row) -> LabelledRow:
    """do-not-answer: one answer per model, harmful 0 or 1, action 0 to 5 (0: it refuses)."""
    kind = text_field(row, "types_of_harm")
    if kind not in DO_NOT_ANSWER:
        raise LabelFault("field 'types_of_harm' has a type that do-not-answer has not")
    models = [name.removesuffix("_response") for name in row.fields if name.endswith("_response")]
    answers = []
    for model in models:
        harmful, action = (
            _number(row, f"{model}_{name}", top) for name, top in (("harmful", 1), ("action", 5))
        )
        unsafe = None if harmful is None else harmful == 1
        # harmful says nothing about other types; harmless excludes them all
        other = False if unsafe is False else None
        flags = tuple(unsafe if name == kind else other for name in DO_NOT_ANSWER)
        refusal = None if action is None else action == 0
        text = text_field(row, f"{model}_response")
        answers.append(Answer(text, unsafe, flags, "do-not-answer", None, refusal, model))
    topic = Answer("", None, tuple(name == kind or None for name in DO_NOT_ANSWER), "do-not-answer")
    return LabelledRow(text_field(row, "question"), tuple(answers), prompt_label=topic)


def _number(row: Row, name: str, top: int) -> int | None:
    value = row.fields.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return choice_field(row, name, range(top + 1))


def _beavertails_evaluation(row: Row) -> LabelledRow:
    """BeaverTails-Evaluation: a prompt and the one of 14 categories that it is about."""
    kind = text_field(row, "category")
    if kind not in BEAVERTAILS:
        raise LabelFault("field 'category' has a category that beavertails has not")
    flags = tuple(name == kind or None for name in BEAVERTAILS)
    return LabelledRow(text_field(row, "prompt"), prompt_label=Answer("", None, flags, "beavertails"))


def _moderation(row: Row) -> LabelledRow:
    """A written ModerationRecord (labelled_writers.py)."""
    fields = row.fields
    label_set, given = text_field(row, "label_set", ""), fields.get("categories") or {}
    if given and (label_set not in LABEL_SETS or not isinstance(given, Mapping)):
        raise LabelFault("field 'categories' is not an object of categories of 'label_set'")
    names = LABEL_SETS.get(label_set, ())
    if not all(name in names for name in given):
        raise LabelFault("field 'categories' has a category that 'label_set' has not")
    flags = tuple(_flag(row, "categories", given.get(name)) for name in names) if given else ()
    severity = harm_label(row, "", "", "severity", "pku").severity
    unsafe, refusal = (_flag(row, name, fields.get(name)) for name in ("unsafe", "refusal"))
    source = text_field(row, "source", "")
    answer = Answer(
        text_field(row, "response"), unsafe, flags, label_set if given else "", severity, refusal, source
    )
    if not answer.text:
        return LabelledRow(text_field(row, "prompt"), prompt_label=answer)
    return LabelledRow(text_field(row, "prompt"), (answer,))


def _flag(row: Row, name: str, value: Any) -> bool | None:
    flag = as_flag(row, value)
    if flag is None and value is not None:
        raise LabelFault(f"field '{name}' is not true or false")
    return flag


LABELLED_FORMS: dict[str, LabelledForm] = {
    "dual": LabelledForm(
        ("prompt", "response_0", "response_1", "is_response_0_safe", "response_0_harm_category"), _pair
    ),
    "v0": LabelledForm(("prompt", "response_0", "response_1", "is_response_0_safe"), _pair),
    "single": LabelledForm(("prompt", "response_0", "response_1"), _pair),
    "safe-over-unsafe": LabelledForm(("prompt", "safe_response", "unsafe_response"), _safe_over_unsafe),
    "qa-early": LabelledForm(("prompt", "response", "safety_category"), _qa_early),
    "moderation": LabelledForm(("prompt", "response", "unsafe", "categories", "label_set"), _moderation),
    "qa": LabelledForm(("prompt", "response", "harm_category"), _qa),
    "beavertails": LabelledForm(("prompt", "response", "category", "is_safe"), _beavertails),
    "qa-plain": LabelledForm(("prompt", "response", "is_safe"), _qa),
    "cs-rlhf": LabelledForm(("prompt", "response", "label"), _cs_rlhf),
    "xstest": LabelledForm(("prompt", "completion", "final_label"), _xstest),
    "do-not-answer": LabelledForm(("question", "types_of_harm"), _do_not_answer),
    "beavertails-evaluation": LabelledForm(("prompt", "category", "category_id"), _beavertails_evaluation),
    "openai": LabelledForm(("prompt",), _openai, OPENAI_LETTERS),
}
"""Name -> form, in the order in which they are tried."""
