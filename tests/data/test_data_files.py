"""Files and sources: every format of file, every kind of damage (one line names the place), mixtures."""

import csv
import gzip
import json

import pytest

from saferlhf_fast.config.stages import Source
from saferlhf_fast.data.sources import load_rows, load_sources
from saferlhf_fast.errors import UserError

ROWS = [{"prompt": f"How tall is tree {i}?", "n": i} for i in range(6)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def fields(path, **more):
    return [row.fields for row in load_rows(Source(str(path), **more))]


def refusal(path, content=None, **more):
    """Returns the text of the UserError, which must be a single line."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_rows(Source(str(path), **more))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", jsonl(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.json", jsonl(ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("a.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS)),
        ("a.jsonl", b"\n\n" + jsonl(ROWS).replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", gzip.compress(jsonl(ROWS))),
    ],
)
def test_json_is_read_in_every_form(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert fields(tmp_path / name) == ROWS


def test_line_numbers_count_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl(ROWS[:1]) + b"\n" + jsonl(ROWS[1:2]))
    assert [row.where for row in load_rows(Source(str(tmp_path / "a.jsonl")))] == [
        f"{tmp_path}/a.jsonl line 2",
        f"{tmp_path}/a.jsonl line 4",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_keeps_text_as_it_is(tmp_path, name):
    rows = [{"prompt": 'Two\nlines, "quoted"', "answer": "NA"}, {"prompt": "", "answer": "007"}]
    with (gzip.open if name.endswith("gz") else open)(
        tmp_path / name, "wt", newline="", encoding="utf-8"
    ) as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    assert fields(tmp_path / name) == rows


def test_parquet_is_read_and_damage_is_reported(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == ROWS
    assert "Parquet" in refusal(tmp_path / "b.parquet", b"PAR1 no")


def test_a_folder_gives_the_named_split_and_other_files_are_skipped(tmp_path):
    (tmp_path / "data" / "Small").mkdir(parents=True)
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "data" / "Small" / "train-00000-of-00002.jsonl").write_bytes(jsonl(ROWS[:2]))
    (tmp_path / "data" / "Small" / "train-00001-of-00002.jsonl").write_bytes(jsonl(ROWS[2:3]))
    (tmp_path / "data" / "Small" / "test.jsonl").write_bytes(jsonl(ROWS[3:]))
    assert fields(tmp_path) == ROWS[:3]
    assert fields(tmp_path, split="test", name="small") == ROWS[3:]
    assert "validation" in refusal(tmp_path, split="validation")
    assert "large" in refusal(tmp_path, name="large")
    (tmp_path / "empty").mkdir()
    assert "no data file" in refusal(tmp_path / "empty")


def test_a_saved_data_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert fields(tmp_path / "saved") == ROWS
    datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "splits"))
    assert "'train'" in refusal(tmp_path / "splits")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", ["empty"]),
        ("a.jsonl", b" \n\n", ["empty"]),
        ("a.json", b"[]", ["no records"]),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS * 50))[:-30], ["gzip", "truncated"]),
        ("a.jsonl.gz", jsonl(ROWS), ["gzip"]),
        ("a.jsonl.gz", b"", ["empty"]),
        ("a.jsonl", jsonl(ROWS[:2]) + b'{"prompt": \n', ["line 3", "not JSON"]),
        ("a.jsonl", jsonl(ROWS)[:-9], ["line 6", "not JSON"]),
        ("a.jsonl", jsonl(ROWS[:1]) + b"[1, 2]\n", ["line 2", "object", "a list"]),
        ("a.jsonl", jsonl(ROWS[:1]) + b'{"prompt": "caf\xe9"}\n', ["line 2", "UTF-8", "0xe9"]),
        ("a.json", b'[{"prompt": "a"},\n {"prompt": oops}]', ["line 2", "not JSON", "column"]),
        ("a.json", b'[\n{"prompt": "caf\xe9"}]', ["line 2", "UTF-8"]),
        ("a.json", b"3", ["list of records", "number 3"]),
        ("a.json", b'[{"prompt": "a"}, "b"]', ["row 2", "object", 'the text "b"']),
        ("a.json", b"[" * 100000, ["not JSON"]),
        ("a.csv", b"prompt,answer\n", ["no records"]),
        ("a.csv", b"prompt,answer\na,b\nc\n", ["line 3", "2 columns", "got 1"]),
        ("a.csv", b"prompt,answer\na,b,c\n", ["line 2", "2 columns", "got 3"]),
        ("a.csv", b'prompt\n"a\n', ["not CSV"]),
        ("a.csv", b"prompt\na\0b\n", ["line 2", "zero byte"]),
        ("a.txt", b"hello", ["expected a data file", ".jsonl"]),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path, name, content, words):
    message = refusal(tmp_path / name, content)
    assert all(word in message for word in words), message


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.jsonl")


def test_an_unknown_hub_name_is_an_error_of_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # so that no request is sent to the Hub before

    def load_dataset(path, name=None, split=None):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match="owner/none: no such file or folder here.*ConnectionError: no network"
    ):
        load_rows(Source("owner/none"))


def test_rows_are_read_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # so that no request is sent to the Hub before
    calls = []

    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert fields("owner/trees", name="small", split="test") == ROWS
    assert calls == [("owner/trees", "small", "test")]


def test_columns_are_renamed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    (loaded,) = load_sources(Source(str(tmp_path / "a.jsonl"), columns={"prompt": "goal"}))
    assert loaded.rows[0].fields == {"goal": ROWS[0]["prompt"], "n": 0}
    with pytest.raises(UserError, match="line 1: columns renames 'text', but the row has"):
        load_sources(Source(str(tmp_path / "a.jsonl"), columns={"text": "goal"}))


def test_mixture_counts_and_proportions(tmp_path):
    for name, n in (("a", 40), ("b", 10), ("c", 7)):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([{"prompt": f"{name}{i}"} for i in range(n)]))
    path = {name: str(tmp_path / f"{name}.jsonl") for name in "abc"}

    def sizes(data, seed=0):
        return [len(item.rows) for item in load_sources(data, seed)]

    assert sizes([path["a"], Source(path["b"], count=3), Source(path["c"], count=99)]) == [40, 3, 7]
    assert sizes([Source(path["a"], proportion=3), Source(path["b"], proportion=1)]) == [30, 10]
    assert sizes([Source(path["a"], proportion=0.5), path["b"]]) == [5, 10]
    assert sizes([Source(path["a"], count=4, proportion=1), Source(path["b"], proportion=2)]) == [4, 8]

    def drawn(seed):
        return [row.fields["prompt"] for row in load_sources(Source(path["a"], count=8), seed)[0].rows]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 8
    with pytest.raises(UserError, match="at least one source"):
        load_sources([])


def test_nothing_is_written_beside_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    load_sources(str(tmp_path / "a.jsonl"))
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]
