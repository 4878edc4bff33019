"""Harm: the taxonomies and their mappings; labels of each response from file to batch; invalid labels."""

import json

import pytest
import torch
from data_tokenizers import byte_tokenizer
from kit import shared

from saferlhf_fast.data.batches import collate_labels
from saferlhf_fast.data.examples import preference_examples, sft_examples
from saferlhf_fast.data.harm_taxonomy import (
    BEAVERTAILS,
    COUNTERPARTS,
    PKU,
    SEVERITIES,
    TAXONOMIES,
    round_trip,
    translate,
)

A, B = "A robin.", "A crow, I think."
CRIME, DRUGS, PRIVACY = (PKU.index(name) for name in ("Economic Crime", "Drugs", "Privacy Violation"))


def flags(*harmful, names=PKU):
    return {name: name in harmful for name in names}


def pair(**changes):
    """A row of the v0 schema, with the fields of `changes`."""
    return {
        "prompt": "Which bird?",
        "response_0": A,
        "response_1": B,
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
        **changes,
    }


def full(**changes):
    """A row of PKU-SafeRLHF with the labels of its current files."""
    return pair(
        **{
            "response_0_harm_category": flags(),
            "response_1_harm_category": flags("Drugs", "Economic Crime"),
            "response_0_severity_level": 0,
            "response_1_severity_level": 2,
            **changes,
        }
    )


@pytest.fixture
def load(tmp_path):
    """A function that writes rows to a file and loads them; returns (examples, Report)."""

    def write_and_load(rows, read=preference_examples, labels=True, name="rows.jsonl", **more):
        path = tmp_path / name
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".csv"):
            path.write_text(
                "\n".join(",".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)])
            )
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read(str(path), byte_tokenizer(), "auto", 512, labels=labels, **more)

    return write_and_load


# ---------------------------------------------------------------- taxonomies


def test_every_category_is_mapped_or_listed_as_without_counterpart():
    assert {name: len(names) for name, names in TAXONOMIES.items()} == {
        "pku": 19,
        "beavertails": 14,
        "openai": 13,
        "mlcommons": 14,
        "do-not-answer": 12,
    }
    assert all(len(set(names)) == len(names) for names in TAXONOMIES.values()) and len(SEVERITIES) == 4
    for (source, target), table in COUNTERPARTS.items():
        assert tuple(table) == TAXONOMIES[source]
        assert {name for names in table.values() for name in names} <= set(TAXONOMIES[target])
    missing = {
        pair: [name for name, names in table.items() if not names] for pair, table in COUNTERPARTS.items()
    }
    assert missing == {
        ("pku", "beavertails"): [],
        ("beavertails", "pku"): [],
        ("pku", "openai"): [
            "Endangering Public Health",
            "Privacy Violation",
            "Mental Manipulation",
            "Environmental Damage",
        ],
        ("openai", "pku"): [
            "harassment/threatening",
            "hate/threatening",
            "self-harm/instructions",
            "self-harm/intent",
        ],
        ("pku", "mlcommons"): ["Insulting Behavior", "Mental Manipulation", "Environmental Damage"],
        ("mlcommons", "pku"): ["S5"],
        ("pku", "do-not-answer"): ["Environmental Damage"],
        ("do-not-answer", "pku"): ["Treat Chatbot as a Human"],
    }


def test_translations_report_missing_and_uncertain_categories():
    translation = translate(["Cybercrime", "Privacy Violation", "Environmental Damage"], "pku", "openai")
    assert translation.categories == ("illicit",) and translation.missing == (
        "Privacy Violation",
        "Environmental Damage",
    )
    assert translation.uncertain == () and translation.shared == (
        "illicit",
    )  # seven other crimes are illicit too
    back = translate(["privacy_violation", "animal_abuse"], "beavertails", "pku")
    assert back.categories == ("Privacy Violation", "Cybercrime", "Animal Abuse")
    assert back.uncertain == ("privacy_violation",) and back.missing == back.shared == ()
    restored = [category for category in PKU if round_trip(category, "pku", "beavertails") == (category,)]
    assert restored == ["Endangering Public Health", "Drugs", "Disrupting Public Order", "Animal Abuse"]
    assert sum(round_trip(name, "beavertails", "pku") == (name,) for name in BEAVERTAILS) == 6
    assert all(category in round_trip(category, "pku", "beavertails") for category in PKU)
    assert round_trip("Environmental Damage", "pku", "mlcommons") == ()
    with pytest.raises(ValueError, match="expected names of pku, got 'Piracy'"):
        translate(["Piracy"], "pku", "openai")
    with pytest.raises(
        ValueError, match="expected pku and one of beavertails, .* got 'openai' and 'mlcommons'"
    ):
        translate([], "openai", "mlcommons")


@pytest.mark.skipif(shared() is None, reason="no folder of real data (SAFERLHF_DATA or ../shared)")
def test_names_are_spelled_as_in_the_files():
    import csv
    import gzip

    rows = json.loads((shared() / "data" / "prompts_safety" / "beavertails_evaluation_700.json").read_text())
    assert tuple(sorted({row["category"] for row in rows})) == BEAVERTAILS
    with gzip.open(
        shared() / "data" / "moderation" / "do_not_answer_en_6models.csv.gz", "rt", encoding="utf-8"
    ) as file:
        assert {row["types_of_harm"] for row in csv.DictReader(file)} == set(TAXONOMIES["do-not-answer"])


# ---------------------------------------------------------------- from files to batches


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_labels_of_pairs_reach_the_batch(load, name):
    # In the second row the unsafe response comes first in the file, and some of its labels are unknown.
    partial = full(
        response_0_severity_level=None,
        response_0_harm_category={**flags("Drugs"), "Privacy Violation": None},
        response_1_harm_category=flags(),
        response_1_severity_level=0,
        is_response_0_safe=False,
        is_response_1_safe=True,
        safer_response_id=1,
        prompt="Which tree?",
    )
    examples, report = load([full(), partial], name=name, kind="cost")
    batch = collate_labels(examples)
    assert report.kept == 2 and not report.dropped and not report.flagged
    # The rows are the safer responses of both pairs, then the other ones.
    assert batch.sign_B.tolist() == [-1, -1, 1, 1] and batch.severity_B.tolist() == [0, 0, 2, -1]
    assert batch.categories_BC.shape == batch.known_BC.shape == (4, 19)
    assert batch.categories_BC.nonzero().tolist() == [[2, DRUGS], [2, CRIME], [3, DRUGS]]
    assert (~batch.known_BC).nonzero().tolist() == [[3, PRIVACY]]
    assert [t.dtype for t in (batch.sign_B, batch.severity_B)] == [torch.int64] * 2
    assert batch.categories_BC.dtype == batch.known_BC.dtype == torch.bool
    # the better one first
    assert collate_labels(load([full()], kind="reward")[0]).severity_B.tolist() == [2, 0]


@pytest.mark.parametrize(
    "row, sign, severity, harmful, known",
    [
        ({"is_safe": False, "harm_category": flags("Drugs"), "severity_level": 3}, 1, 3, [DRUGS], 19),
        ({"is_safe": True, "harm_category": {"Drugs": False}, "severity_level": 0}, -1, 0, [], 1),
        (
            {"is_safe": False, "category": flags("self_harm", names=BEAVERTAILS)},
            1,
            -1,
            [BEAVERTAILS.index("self_harm")],
            14,
        ),
        ({"is_safe": None, "severity_level": None, "harm_category": None}, 0, -1, [], 0),
        ({"category": "birds"}, 0, -1, [], 0),
    ],
)
def test_labels_of_single_responses_reach_the_batch(load, row, sign, severity, harmful, known):
    (example,), _ = load([{"prompt": "Which bird?", "response": A, **row}], sft_examples)
    taxonomy = "beavertails" if isinstance(row.get("category"), dict) else "pku"
    batch = collate_labels([example], taxonomy)
    assert (batch.sign_B.tolist(), batch.severity_B.tolist()) == ([sign], [severity])
    assert batch.categories_BC[0].nonzero().flatten().tolist() == harmful and batch.known_BC.sum() == known
    # In the columns of another taxonomy no label is known, and none is guessed.
    other = collate_labels([example], "pku" if taxonomy == "beavertails" else "beavertails")
    assert not other.known_BC.any() and not other.categories_BC.any() and other.sign_B.tolist() == [sign]


def test_labels_that_a_schema_lacks_are_unknown(load):
    v0 = collate_labels(load([pair()], kind="cost")[0])
    assert v0.sign_B.tolist() == [-1, 1] and v0.severity_B.tolist() == [-1, -1] and not v0.known_BC.any()
    over = load([{"prompt": "Which bird?", "safe_response": A, "unsafe_response": B}], kind="cost")[0]
    assert collate_labels(over).sign_B.tolist() == [-1, 1]
    chosen = load([{"prompt": "Which bird?", "chosen": A, "rejected": B}])[0]
    assert collate_labels(chosen).sign_B.tolist() == [0, 0]
    text = pair(response_1="A crow.", response_0_severity_level="", response_1_severity_level=3)
    assert collate_labels(load([text], name="rows.csv", kind="cost")[0]).severity_B.tolist() == [-1, 3]


def test_labels_of_the_demo_world_reach_the_batch(load):
    from saferlhf_fast.demo.world import World

    world = World(0)
    rows = world.preference_records(world.annotation_prompts(40))
    examples, _ = load(rows, kind="safer")
    golds = [
        world.gold_scores(e.prompt_text, text)
        for which in ("first_text", "second_text")
        for e in examples
        for text in [getattr(e, which)]
    ]
    batch = collate_labels(examples)
    assert (
        batch.severity_B.tolist() == [gold.severity for gold in golds]
        and len(set(batch.severity_B.tolist())) > 2
    )
    assert batch.categories_BC.tolist() == [[name in gold.categories for name in PKU] for gold in golds]


# ---------------------------------------------------------------- invalid labels


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"response_1_severity_level": 4}, "field 'response_1_severity_level' is not a severity of 0 to 3"),
        ({"response_0_severity_level": -1}, "field 'response_0_severity_level' is not a severity of 0 to 3"),
        (
            {"response_0_severity_level": True},
            "field 'response_0_severity_level' is not a severity of 0 to 3",
        ),
        ({"response_0_severity_level": 1.5}, "field 'response_0_severity_level' is not a severity of 0 to 3"),
        (
            {"response_0_harm_category": {"Piracy": False}},
            "field 'response_0_harm_category' has a category that pku has not: Piracy",
        ),
        (
            {"response_1_harm_category": {**flags(), "Drugs": 1}},
            "field 'response_1_harm_category.Drugs' is not true or false",
        ),
        (
            {"response_1_harm_category": ["Drugs"]},
            "field 'response_1_harm_category' is not an object of categories with true or false",
        ),
    ],
)
def test_wrong_labels_are_counted_by_reason_where_labels_are_requested(load, changes, reason):
    rows = [full(), full(prompt="Which tree?", **changes), full(prompt="Which fish?")]
    examples, report = load(rows, kind="cost")
    assert [example.prompt_text for example in examples] == ["Which bird?", "Which fish?"]
    assert dict(report.dropped) == {reason: 1} and report.sources[0].place(reason) == "line 2"
    # A stage that does not use the labels trains on the row.
    plain, report = load(rows, labels=False, kind="cost")
    assert len(plain) == 3 and not report.dropped and all(example.labels == () for example in plain)


def test_wrong_labels_of_single_responses_are_counted(load):
    row = {"prompt": "Which bird?", "response": A}
    rows = [
        row,
        {**row, "is_safe": 2},
        {**row, "category": {"piracy": True}},
        {**row, "category": {"self_harm": "yes"}},
    ]
    examples, report = load(rows, sft_examples)
    assert len(examples) == 1 and dict(report.dropped) == {
        "field 'is_safe' is not true or false": 1,
        "field 'category' has a category that beavertails has not: piracy": 1,
        "field 'category.self_harm' is not true or false": 1,
    }


@pytest.mark.parametrize(
    "changes, disagree",
    [
        ({}, 0),
        ({"response_1_severity_level": 0}, 1),
        ({"response_0_severity_level": 1}, 1),
        ({"response_0_harm_category": flags("Drugs")}, 1),
        ({"response_1_harm_category": flags()}, 1),
        # the other categories are unknown, so there may be harm
        ({"response_1_harm_category": {"Drugs": False}}, 0),
    ],
)
def test_labels_that_contradict_each_other_are_flagged_and_kept(load, changes, disagree):
    examples, report = load([full(**changes)], kind="cost")
    assert len(examples) == 1 and report.flagged.total() == disagree
    assert set(report.flagged) <= {"safety, severity and categories of a response contradict each other"}


def test_a_batch_without_labels_is_refused(load):
    pairs, singles = load([full()])[0], load([{"prompt": "Which bird?", "response": A}], sft_examples)[0]
    with pytest.raises(ValueError, match="load them with labels=True"):
        collate_labels(load([full()], labels=False)[0])
    with pytest.raises(ValueError, match="expected pairs or single responses, got both"):
        collate_labels(pairs + singles)
    with pytest.raises(ValueError, match="taxonomy: expected one of pku, beavertails"):
        collate_labels(pairs, "aegis")
    assert collate_labels([]).known_BC.shape == (0, 19)
