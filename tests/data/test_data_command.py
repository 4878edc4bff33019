"""Labelled forms, their conversion, inspection and split: every public form, bad rows, duplicates, sides."""

import gzip
import json

import pytest
from kit import shared

from saferlhf_fast.cli import main
from saferlhf_fast.data.harm_taxonomy import BEAVERTAILS, DO_NOT_ANSWER, PKU
from saferlhf_fast.data.hash_columns import HashColumn
from saferlhf_fast.data.inspection import Inspector
from saferlhf_fast.data.labelled_writers import FormWriter
from saferlhf_fast.data.moderation_records import read_moderation_records
from saferlhf_fast.data.row_stream import RowReader


def flags(*harmful, names=PKU):
    return {name: name in harmful for name in names}


def dual(i=0, **changes):
    row = {
        "prompt": f"How does bird number {i} find its way home over the sea?",
        **{f"response_{k}": f"Answer {k} of {i}." for k in (0, 1)},
        "prompt_source": "human",
        **{f"response_{k}_source": "alpaca-7b" for k in (0, 1)},
        **{f"is_response_{k}_safe": k == 0 for k in (0, 1)},
        "response_0_harm_category": flags(),
        "response_1_harm_category": flags("Drugs", "Cybercrime"),
        **{f"response_{k}_severity_level": 2 * k for k in (0, 1)},
        "better_response_id": i % 2,
        "safer_response_id": 0,
        **{f"response_{k}_sha256": f"{i}{k}" for k in (0, 1)},
    }
    return row | changes


QA = {"prompt": "P?", "response": "R.", "is_safe": False, "sha256": "0"}
EARLY = {"prompt": "P?", "response": "R.", "severity_category": 2, "sha256": "0"}
DNA = {"question": "Q?", "types_of_harm": DO_NOT_ANSWER[0], "m_response": "R.", "m_harmful": 0, "m_action": 0}
NOT_IN_V0 = ("category", "level", "source", "sha256")
FORMS = {
    "dual": (dual(), [(False, (), 0), (True, ("Drugs", "Cybercrime"), 2)]),
    "v0": (
        {key: value for key, value in dual().items() if not key.endswith(NOT_IN_V0)},
        [(False, (), None), (True, (), None)],
    ),
    "qa": (QA | {"harm_category": flags("Drugs"), "severity_level": 2}, [(True, ("Drugs",), 2)]),
    "qa-early": (EARLY | {"safety_category": [int(n == "Drugs") for n in PKU]}, [(True, ("Drugs",), 2)]),
    "beavertails": (
        {key: QA[key] for key in ("prompt", "response", "is_safe")}
        | {"category": flags("animal_abuse", names=BEAVERTAILS)},
        [(True, ("animal_abuse",), None)],
    ),
    "cs-rlhf": ({"prompt": "P?", "response": "R.", "label": "Unsafe"}, [(True, (), None)]),
    "do-not-answer": (DNA | {"n_response": "S.", "n_harmful": 1, "n_action": 4},
                      [(False, (), None), (True, (DO_NOT_ANSWER[0],), None)]),
    "xstest": ({"prompt": "P?", "completion": "R.", "final_label": "2_full_refusal"}, [(None, (), None)]),
}  # fmt: skip


def write(path, rows):
    path.write_bytes(
        b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    )
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_keeps_its_labels(form, tmp_path):
    row, expected = FORMS[form]
    reader = RowReader([write(tmp_path / "a.jsonl", [row])])
    ((_, (item,)),) = list(reader)
    assert reader.counts[0].form == form
    assert [(a.unsafe, a.names(), a.severity) for a in item.answers] == expected
    records = read_moderation_records(str(tmp_path / "a.jsonl"))
    assert [(r.unsafe, r.severity) for r in records] == [(unsafe, level) for unsafe, _, level in expected]
    if form in ("dual", "v0", "qa", "beavertails", "cs-rlhf", "qa-early"):  # written as it was
        (back,) = FormWriter(form).rows(item)
        assert {key: value for key, value in back.items() if value not in ("", None)} == row


def test_what_is_not_labelled_is_unknown(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "P?", "S": 1, "H": 0}])
    (record,) = read_moderation_records(path)
    assert record.categories == {"S": True, "H": False} | dict.fromkeys(("V", "HR", "SH", "S3", "H2", "V2"))
    dna = read_moderation_records(write(tmp_path / "b.jsonl", [DNA | {"m_harmful": 1, "m_action": None}]))[0]
    assert (dna.refusal, dna.categories[DO_NOT_ANSWER[0]], dna.categories[DO_NOT_ANSWER[1]]) == (
        None,
        True,
        None,
    )
    numbers = [({0}, ()), ({7, 14}, ("Drugs", "Cybercrime"))]
    for given, names in numbers:
        row = EARLY | {"safety_category": sorted(given), "severity_category": 0 if given == {0} else 3}
        ((_, (item,)),) = list(RowReader([write(tmp_path / "c.jsonl", [row])]))
        assert item.answers[0].names() == names and item.answers[0].unsafe == bool(names)


BAD = [
    (b'{"prompt": "cut\n', "not JSON"),
    (b'\xff\xfe"\n', "not UTF-8"),
    (b"[1]\n", "not a JSON object"),
    (json.dumps(dual()).encode()[:-1] + b', "prompt": "Q?"}\n', "a column that is there twice"),
    ({"prompt": "P?"}, "no field 'response_0'"),
    (dual(prompt=" "), "the prompt is empty"),
    (dual(response_1=3), "field 'response_1': expected text"),
    (dual(response_0_severity_level=4), "field 'response_0_severity_level' is not a severity of 0 to 3"),
    (dual(is_response_1_safe="no"), "field 'is_response_1_safe' is not true or false"),
    (dual(safer_response_id=2), "field 'safer_response_id': expected 0 or 1"),
    (
        dual(response_0_harm_category={"Rudeness": True}),
        "field 'response_0_harm_category' has a category that pku has not: Rudeness",
    ),
]  # fmt: skip


def test_bad_rows_are_counted_written_with_their_lines_and_skipped(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [dual(), *(row for row, _ in BAD), dual(1)])
    assert main(["data", "convert", path, "to=qa", f"output={tmp_path / 'out.jsonl'}"]) == 0
    bad = read(tmp_path / "out.bad.jsonl")
    assert [(row["number"], row["reason"]) for row in bad] == [(i, r) for i, (_, r) in enumerate(BAD, 2)]
    assert len(read(tmp_path / "out.jsonl")) == 4
    assert f"dual  {len(BAD) + 2}     2       {len(BAD)}" in capsys.readouterr().out
    assert main(["data", "convert", path, "to=qa", f"output={tmp_path / 's.jsonl'}", "strict=true"]) == 2
    assert "a.jsonl line 2: not JSON" in capsys.readouterr().err and not (tmp_path / "s.jsonl").exists()


def test_what_a_quick_parser_would_change_is_as_it_was(tmp_path):
    """Quick parsers round large integers, refuse NaN and take the last of two names."""
    rows = [
        {"prompt": "P?", "id": 12345678901234567890123},
        {"prompt": "P?", "id": 2**64},
        {"prompt": "P?", "more": [{"n": -(10**30)}]},
        {"prompt": 'He said "prompt": "twice": really', "id": 2**64 - 1},
        {"prompt": "P?", "id": float("nan"), "more": [{"a": {"b": [1e300]}}, {"a": 1}]},
    ]
    path = write(
        tmp_path / "a.jsonl", [b"\xef\xbb\xbf" + json.dumps(rows[0]).encode() + b"\n", b"  \n", *rows[1:]]
    )
    found = [row.fields for row, _ in RowReader([path])]
    assert repr(found) == repr(rows)


def test_a_label_of_another_kind_is_not_cs_rlhf(tmp_path):
    rows = [{"prompt": "P?", "response": "R.", "label": label} for label in (True, False)]
    reader = RowReader([write(tmp_path / "a.jsonl", rows)])
    assert len(list(reader)) == 2 and reader.counts[0].form == "qa"


def test_messages_of_a_preference_are_the_preferred_answer(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [dual(0), dual(1)])
    for by, texts in (
        ("better", ["Answer 0 of 0.", "Answer 1 of 1."]),
        ("safer", ["Answer 0 of 0.", "Answer 0 of 1."]),
    ):
        words = ["to=trl-messages", f"by={by}", f"output={tmp_path / by}.jsonl"]
        assert main(["data", "convert", path, *words]) == 0
        assert [row["messages"][1]["content"] for row in read(tmp_path / f"{by}.jsonl")] == texts
        assert "answers that are not preferred     2" in capsys.readouterr().out


def test_inspect_counts(tmp_path):
    rows = [dual(i) for i in range(5)]
    rows += [rows[0], dual(1, is_response_1_safe=True), dual(2, response_0_harm_category=flags("Drugs"))]
    inspector = Inspector()
    for _, found in RowReader([write(tmp_path / "a.jsonl", rows)]):
        inspector.add(found)
    result = inspector.result()
    assert result["duplicates"] == {"rows": 3, "prompts": 3, "distinct_prompts": 5, "answers": 6}
    assert result["contradictions"] == {
        "labelled_both_ways": 1,
        "labelled_both_ways_answers": 2,
        "safe with severity > 0": 1,
        "safe with a category": 2,
    }
    drugs = result["answers"]["categories"]["pku"]["Drugs"]
    assert drugs == {"total": 9, "2": 8, "0": 1, "label_unknown": 0}
    assert result["better_is_safer"] == {"rows": 8, "agree": 5}


def test_the_command_writes_a_page_and_finds_overlap(tmp_path):
    a, b = (write(tmp_path / f"{name}.jsonl", rows) for name, rows in
            (("a", [dual(i) for i in range(6)]), ("b", [dual(4), dual(9)])))  # fmt: skip
    assert main(["data", "inspect", a, f"against={b}", "near=0.9", f"output={tmp_path / 'o'}"]) == 0
    result = json.loads((tmp_path / "o" / "inspection.json").read_text())
    assert result["overlap"]["rows_with_a_shared_prompt"] == 1 and result["overlap"]["shared_answers"] == 2
    page = (tmp_path / "o" / "inspection.html").read_text()
    assert "__DATA__" not in page and "http" not in page and not (tmp_path / "o" / "bad.jsonl").exists()


def test_split_keeps_near_duplicates_together_and_loses_no_row(tmp_path):
    words = [[f"w{(i * 37 + k * 101) % 997}x{k}" for k in range(14)] for i in range(300)]
    texts = [" ".join(line) for line in words]
    near = [text.capitalize() + "?" for text in texts[:100]] + [text + "s" for text in texts[100:150]]
    rows = [{"prompt": text, "n": n} for n, text in enumerate([*texts, *near, *texts[:20]])]
    output = tmp_path / "parts"
    sides = []
    for order in (rows, rows[::-1]):
        path = write(tmp_path / "a.jsonl", order)
        words_ = ["data", "split", path, f"output={output}", "test=0.2", "validation=0.1", "overwrite=true"]
        assert main(words_) == 0
        sides.append({row["n"]: part for part in ("train", "test", "validation")
                      for row in read(output / f"{part}.jsonl")})  # fmt: skip
    assert sides[0] == sides[1] and sorted(sides[0]) == list(range(len(rows)))
    assert all(sides[0][i] == sides[0][300 + i] for i in range(150))
    assert abs(list(sides[0].values()).count("test") / len(rows) - 0.2) < 0.02


def test_hash_columns_count_the_same_in_parts(monkeypatch):
    column = HashColumn()
    for i in range(3000):
        column.append(hash(("x", i % 1000)) & ~1 | (i % 1000 < 10 and i >= 2000))
    whole = column.distinct(), column.repeated(), column.contradictions()
    monkeypatch.setattr("saferlhf_fast.data.hash_columns._SORTED_AT_ONCE", 100)
    assert (column.distinct(), column.repeated(), column.contradictions()) == whole == (1010, 1990, (10, 30))


@pytest.mark.parametrize("words, line", [
    ([], "expected inspect, convert or split"),
    (["inspect"], "expected a source"),
    (["inspect", "none.jsonl"], "none.jsonl: no such file"),
    (["convert", "a.jsonl", "to=nothing"], "to: expected one of dual"),
    (["convert", "a.jsonl", "to=qa", "output=a.jsonl"], "is a source"),
    (["split", "a.jsonl", "output=o", "test=0.6", "validation=0.5"], "a sum above 0 and below 1"),
    (["split", "a.jsonl", "test=2"], "test: expected a number from 0 to 1"),
    (["inspect", "a.jsonl", "colour=red"], "colour: expected one of"),
])  # fmt: skip
def test_a_mistake_gets_one_line(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [dual()])
    assert main(["data", *words]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


@pytest.mark.skipif(shared() is None, reason="no folder of real data (SAFERLHF_DATA)")
def test_real_files(tmp_path):
    home = shared() / "data" / "moderation"
    dna = read_moderation_records(str(home / "do_not_answer_en_6models.csv.gz"))
    assert (len(dna), sum(record.unsafe for record in dna)) == (5634, 193)
    letters = read_moderation_records(str(home / "openai_moderation_1680.jsonl.gz"))
    positives = [sum(record.categories[name] or 0 for record in letters) for name in letters[0].categories]
    assert positives == [237, 162, 94, 76, 51, 85, 41, 24]
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"".join(json.dumps(dual(i)).encode() + b"\n" for i in range(2000)))[:-400])
    reader = RowReader([str(cut)])
    assert sum(1 for _ in reader) > 500 and reader.counts[0].skipped == 1
