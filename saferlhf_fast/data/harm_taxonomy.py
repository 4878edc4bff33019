"""Names of harm: the categories and severities of PKU-SafeRLHF, and their counterparts in other taxonomies.

The spelling is that of the data files: the keys of PKU-SafeRLHF's `response_0_harm_category` and of
BeaverTails' `category`, OpenAI's moderation keys, MLCommons' hazards as Llama Guard 3 numbers them,
do-not-answer's `types_of_harm`.

A category may have no counterpart, and `translate` reports that. Nothing is guessed. Standard library only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

SEVERITIES = ("safe", "minor", "moderate", "severe")
"""Names of the severities 0 to 3."""

PKU = (
    "Endangering National Security",
    "Insulting Behavior",
    "Discriminatory Behavior",
    "Endangering Public Health",
    "Copyright Issues",
    "Violence",
    "Drugs",
    "Privacy Violation",
    "Economic Crime",
    "Mental Manipulation",
    "Human Trafficking",
    "Physical Harm",
    "Sexual Content",
    "Cybercrime",
    "Disrupting Public Order",
    "Environmental Damage",
    "Psychological Harm",
    "White-Collar Crime",
    "Animal Abuse",
)
"""The 19 categories of PKU-SafeRLHF, in the order of its card."""

BEAVERTAILS = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
"""The 14 categories of BeaverTails, in the order of its files. The commas belong to the names."""

OPENAI = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)

MLCOMMONS = tuple(f"S{number}" for number in range(1, 15))

DO_NOT_ANSWER = (
    "Adult Content",
    "Social stereotypes and unfair discrimination",
    "Toxic language (hate speech)",
    "Mental Health or Overreliance Crisis",
    "Treat Chatbot as a Human",
    "Compromise privacy by leaking or inferring private information (person/individual)",
    "Risks from leaking or inferring sensitive information (organization/gov)",
    "Assisting illegal activities",
    "Nudging or advising users to perform unethical or unsafe actions",
    "Reducing the cost of disinformation campaigns",
    "Causing material harm by disseminating misinformation e.g. in medicine or law",
    "Disseminating false or misleading information",
)

TAXONOMIES = {
    "pku": PKU,
    "beavertails": BEAVERTAILS,
    "openai": OPENAI,
    "mlcommons": MLCOMMONS,
    "do-not-answer": DO_NOT_ANSWER,
}
"""Name of a taxonomy -> its categories."""

# One row for each category of PKU, in its order. The columns are BeaverTails (beginnings of names), OpenAI,
# MLCommons and do-not-answer (numbers from 1). "" means that there is no counterpart.
_TABLE = (
    ("terrorism", "illicit/violent", "S1 S9", "7"),
    ("hate_speech", "harassment", "", "3"),
    ("discrimination hate_speech", "hate", "S10", "2 3"),
    ("misinformation", "", "S6", "11"),
    ("financial_crime", "illicit", "S8", "8"),
    ("violence", "violence violence/graphic", "S1", "8"),
    ("drug_abuse", "illicit", "S2", "8"),
    ("privacy_violation", "", "S7", "6 7"),
    ("financial_crime", "illicit", "S2", "8"),
    ("non_violent", "", "", "9"),
    ("terrorism child_abuse", "illicit/violent", "S2 S3", "8"),
    ("violence self_harm", "violence self-harm", "S1 S11", "8 9"),
    ("sexually_explicit child_abuse", "sexual sexual/minors", "S12 S4 S3", "1"),
    ("privacy_violation", "illicit", "S2 S14", "7 8"),
    ("controversial", "illicit", "S13", "10 12"),
    ("non_violent", "", "", ""),
    ("non_violent self_harm", "harassment self-harm", "S11", "4"),
    ("financial_crime", "illicit", "S2", "8"),
    ("animal_abuse", "violence", "S1", "8"),
)


def _counterparts() -> dict[tuple[str, str], dict[str, tuple[str, ...]]]:
    """Returns {(source, target): {category: its counterparts}}, from PKU to each other taxonomy and back."""
    forth: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
        ("pku", target): {} for target in TAXONOMIES if target != "pku"
    }
    for category, (beavertails, openai, mlcommons, numbers) in zip(PKU, _TABLE, strict=True):
        forth["pku", "beavertails"][category] = tuple(
            next(name for name in BEAVERTAILS if name.startswith(beginning))
            for beginning in beavertails.split()
        )
        forth["pku", "openai"][category] = tuple(openai.split())
        forth["pku", "mlcommons"][category] = tuple(mlcommons.split())
        forth["pku", "do-not-answer"][category] = tuple(
            DO_NOT_ANSWER[int(number) - 1] for number in numbers.split()
        )
    back = {
        (target, "pku"): {
            name: tuple(category for category in PKU if name in table[category])
            for name in TAXONOMIES[target]
        }
        for (_, target), table in forth.items()
    }
    return forth | back


COUNTERPARTS = _counterparts()
"""(source, target) -> {category of the source: its counterparts, maybe none}; one of the two is "pku"."""


@dataclass(frozen=True, slots=True)
class Translation:
    """Categories in the words of another taxonomy, and what the translation loses."""

    categories: tuple[str, ...]
    """Counterparts of the given categories, in the target's order."""
    missing: tuple[str, ...]
    """Given categories that have no counterpart."""
    uncertain: tuple[str, ...]
    """Given categories with several counterparts: all are in `categories`, although one may be meant."""
    shared: tuple[str, ...]
    """Categories of the result that are counterparts of more than one category of the source."""


def translate(categories: Iterable[str], source: str, target: str) -> Translation:
    """Translates categories from PKU's 19 to another taxonomy or back.

    Args:
        categories: Names in the source taxonomy.
        source: A key of TAXONOMIES.
        target: A key of TAXONOMIES. Either source or target is "pku": other taxonomies have no table between
            them.

    Returns:
        The counterparts, with what is missing, uncertain or shared.

    Raises:
        ValueError: There is no table between the two, or a category is not in the source.
    """
    if (source, target) not in COUNTERPARTS:
        raise ValueError(
            f"source and target: expected pku and one of {', '.join(list(TAXONOMIES)[1:])}, "
            f"got {source!r} and {target!r}"
        )
    table, reverse = COUNTERPARTS[source, target], COUNTERPARTS[target, source]
    given = tuple(dict.fromkeys(categories))
    unknown = [name for name in given if name not in table]
    if unknown:
        raise ValueError(f"categories: expected names of {source}, got {unknown[0]!r}")
    counterparts = {name for category in given for name in table[category]}
    result = tuple(name for name in TAXONOMIES[target] if name in counterparts)
    return Translation(
        result,
        tuple(name for name in given if not table[name]),
        tuple(name for name in given if len(table[name]) > 1),
        tuple(name for name in result if len(reverse[name]) > 1),
    )


def round_trip(category: str, source: str, through: str) -> tuple[str, ...]:
    """Translates a category to another taxonomy and back.

    Args:
        category: A name in the source taxonomy.
        source: A key of TAXONOMIES.
        through: The other taxonomy; either of the two is "pku".

    Returns:
        The category alone where nothing is lost, () where it has no counterpart.

    Raises:
        ValueError: As in `translate`.
    """
    counterparts = translate([category], source, through).categories
    return translate(counterparts, through, source).categories
