"""The cache of tokenised examples: as in memory, by any number of processes; keys; mistakes; size."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_tokenizers import CHATML, byte_tokenizer

from saferlhf_fast.config.setting_types import Source
from saferlhf_fast.data import token_cache as module
from saferlhf_fast.data.batches import split_by_prompt
from saferlhf_fast.data.examples import preference_examples, sft_examples
from saferlhf_fast.data.token_cache import SFT, token_cache
from saferlhf_fast.errors import UserError

WORDS = "a robin crow sings in the old tree tonight é 日本".split()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)


def text(seed, n=6):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, n)))


def pair(i):
    """A row; some repeat another one in the other order or with other signs, are empty or too long."""
    safe, better = i // 5 % 3 != 0, i // 7 % 2
    return {
        "prompt": text(i % 3 if i < 40 else i, 9),
        "response_0": text(i % 2 + 100),
        "response_1": "x" * 900 if i == 17 else "" if i == 23 else text(i % 2 + 200),
        "is_response_0_safe": safe,
        "is_response_1_safe": i % 2 == 0,
        "better_response_id": better,
        "safer_response_id": better if safe == (i % 2 == 0) else int(not safe),
    }


def dialogue(i):
    answer = "" if i == 9 else "y" * 700 if i == 12 else text(i + 400)
    return {"instruction": text(i % 13, 9), "input": text(i) if i % 4 == 0 else "", "output": answer}


def write(path, rows, blank=()):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for i in blank:
        lines.insert(i, "   " if i % 2 else "")
    path.write_text("\n".join(lines) + ("\n" if len(rows) % 2 else ""), encoding="utf-8")
    return str(path)


def opened(folder, kind, data, world=1, **settings):
    tokenizer = settings.pop("tokenizer", None) or byte_tokenizer(template=CHATML)
    arguments = (folder, kind, data, tokenizer, "auto", settings.get("max_length", 300), 3)
    for rank in range(world):
        assert token_cache(*arguments).build(rank, world) is None
    cache = token_cache(*arguments)
    return cache, *cache.open()


def in_memory(kind, data):
    tokenizer = byte_tokenizer(template=CHATML)
    if kind == SFT:
        return sft_examples(data, tokenizer, "auto", 300, 3)
    return preference_examples(data, tokenizer, "auto", 300, 3, kind)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("kind", [SFT, "reward", "cost", "better", "safer"])
def test_examples_counts_and_split_are_those_of_memory(tmp_path, kind, world):
    make = dialogue if kind == SFT else pair
    folder = tmp_path / "parts"
    folder.mkdir()
    one = write(tmp_path / "one.jsonl", [make(i) for i in range(40)], blank=(0, 3, 3, 21))
    write(folder / "a.jsonl", [make(i) for i in range(20, 50)])
    (folder / "b.json").write_text(json.dumps([make(i) for i in range(50, 60)]))
    data = [Source(one, count=33), Source(str(folder), proportion=2)]
    expected, report = in_memory(kind, data)
    cache, examples, counts = opened(tmp_path / "cache", kind, data, world)
    assert list(examples) == expected and len(expected) > 40 and len(cache.blocks) == 9
    assert counts.as_dict() == report.as_dict() and sorted(counts.lines()) == sorted(report.lines())
    for fraction in (0.0, 0.3, 1e-9, 1 - 1e-9):
        assert [list(part) for part in examples.split_by_prompt(fraction)] == list(
            split_by_prompt(expected, fraction, 3)
        )
    assert examples[-1] == expected[-1] and list(examples[2:9:3]) == expected[2:9:3]
    assert examples.longest == max(
        len(ids) for e in expected for ids in ([e.ids] if kind == SFT else [e.first_ids, e.second_ids])
    )


def test_the_key_is_the_content_and_the_settings(tmp_path):
    rows = [dialogue(i) for i in range(8)]
    first = write(tmp_path / "first.jsonl", rows)
    keys = {}

    def key(name, path=first, tokenizer=None, kind=SFT, template="auto", length=300, seed=3, **source):
        tokenizer = tokenizer or byte_tokenizer(template=CHATML)
        data = Source(path, **source)
        keys[name] = token_cache(tmp_path, kind, data, tokenizer, template, length, seed).folder.name
        return keys[name]

    assert key("first") == key("moved", write(tmp_path / "moved.jsonl", rows))
    called = byte_tokenizer(template=CHATML)
    called("a text", truncation=True, max_length=2, padding="max_length")
    assert key("after a call", tokenizer=called) == keys["first"]
    key("one letter", write(tmp_path / "other.jsonl", [*rows[:-1], {**rows[-1], "output": "B robin"}]))
    key("template", template="safe-rlhf")
    key("chat template", tokenizer=byte_tokenizer(template=CHATML + " "))
    key("tokenizer", tokenizer=byte_tokenizer(template=CHATML, more=("<|more|>",)))
    key("length", length=301)
    key("seed", seed=4)
    key("count", count=5)
    different = [name for name in keys if name not in ("moved", "after a call")]
    assert len({keys[name] for name in different}) == len(different) == 8


def test_a_mistake_has_its_line_and_a_repaired_file_is_built_again(tmp_path):
    rows = [dialogue(i) for i in range(30)]
    rows[25]["output"] = 3
    path = write(tmp_path / "rows.jsonl", rows, blank=(2,))
    tokenizer, line = byte_tokenizer(template=CHATML), f"{path} line 27, field 'output': expected text"
    with pytest.raises(UserError, match="line 27, field 'output'"):
        sft_examples(path, tokenizer)
    cache = token_cache(tmp_path / "cache", SFT, path, tokenizer)
    failures = [cache.build(rank, 2) for rank in (0, 1)]
    assert [f and (f[0], f[1].startswith(line)) for f in failures] == [None, (3, True)]
    assert [cache.path(i).exists() for i in range(5)] == [True, True, True, False, True]
    with pytest.raises(UserError, match=r"block-000003.arrow is missing"):
        cache.open()
    kept = cache.path(0).stat().st_mtime_ns
    (tmp_path / "cache" / cache.folder.name / "block-000003.1.tmp").write_bytes(b"half a block")
    # the same cache goes on where it was; another content begins another one
    assert cache.build(1, 2) is not None and cache.path(0).stat().st_mtime_ns == kept
    rows[25]["output"] = "three"
    write(Path(path), rows, blank=(2,))
    other = token_cache(tmp_path / "cache", SFT, path, tokenizer)
    assert other.folder != cache.folder and other.build() is None and len(other.open()[0]) == 28
    other.path(1).write_bytes(other.path(1).read_bytes()[:300])
    with pytest.raises(UserError, match="block-000001.arrow is damaged"):
        other.open()
    for content, message in ((b"", "no records"), (b" \n\n", "no records"), (b"{", "line 1: not JSON")):
        Path(path).write_bytes(content)
        with pytest.raises(UserError, match=message):
            token_cache(tmp_path / "cache", SFT, path, tokenizer)


def test_lines_are_found_at_every_border_of_what_is_read_together(tmp_path, monkeypatch):
    from saferlhf_fast.data import row_blocks

    rows = [{"prompt": "é" * (i % 5), "i": i} for i in range(30)]
    path = Path(write(tmp_path / "rows.jsonl", rows, blank=(0, 5, 5, 31)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n", 3))
    numbers = {row.where for row in row_blocks.read_file(path)}
    for size in (*range(1, 40), 1 << 20):
        monkeypatch.setattr(row_blocks, "_CHUNK", size)
        lines = row_blocks.LineFile(path)
        assert len(lines) == 30 and [row.fields["i"] for row in lines.read(range(30))] == list(range(30))
        assert {row.where for row in lines.read(range(30))} == numbers
        assert [row.fields["i"] for row in lines.read([0, 3, 4, 29])] == [0, 3, 4, 29]


def test_the_contradictions_that_memory_finds_are_found(tmp_path):
    rows = [pair(i) for i in range(60)]
    path = write(tmp_path / "pairs.jsonl", rows)
    for kind in ("cost", "reward"):
        expected, report = in_memory(kind, path)
        _, examples, counts = opened(tmp_path / "cache", kind, path)
        flagged = [example.flagged for example in examples]
        assert flagged == [example.flagged for example in expected] and 0 < sum(flagged)
        assert counts.flagged == report.flagged
    assert not all(flagged)


SCRIPT = """
import json, sys, time
sys.path[:0] = ["tests/support"]
from data_tokenizers import byte_tokenizer
from saferlhf_fast.data.token_cache import token_cache
from saferlhf_fast.data.batches import batch_order
tokenizer = byte_tokenizer()
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
tokenizer("warm up")
import pyarrow.ipc
before, began = peak(), time.process_time()
cache = token_cache(sys.argv[2], "sft", sys.argv[1], tokenizer, "none")
assert cache.build() is None
examples, report = cache.open()
train, held_out = examples.split_by_prompt(0.01)
batches = batch_order(len(train), 32)
tokens = sum(len(train[i].ids) for _ in range(20) for i in next(batches))
print(json.dumps({"rows": report.kept, "train": len(train), "tokens": tokens,
                  "MB above": (peak() - before) / 1024, "seconds": time.process_time() - began}))
"""


def measured(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(rows):
            file.write(f'{{"prompt": "number {i}", "completion": "{i % 97} birds"}}\n')
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
    )
    values = json.loads(ended.stdout.splitlines()[-1])
    print(values, f"{path.stat().st_size / 1e6:.0f} MB, {time.monotonic() - began:.0f} s")
    assert (
        values["rows"] == rows and 0 < rows - values["train"] < rows / 50 and values["tokens"] > 20 * 32 * 8
    )
    return values


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("rows", [500_000, 10_000_000])
def test_memory_of_a_large_file(tmp_path, rows):
    assert measured(tmp_path, rows)["MB above"] < 1024
