"""bench/moderation_figures.py: its folds, labels and paired table. Training is left to the command itself."""

import importlib.util
import json

import kit
import numpy as np
import pytest

pytest.importorskip("sklearn")
SPEC = importlib.util.spec_from_file_location("figures", kit.ROOT / "bench" / "moderation_figures.py")
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)


def write_folds(out, name, moderator, folds=figures.FOLDS, n=400, seed=0):
    """Scores of two rows a prompt: TF-IDF's, which know the label with noise, and `moderator(true, draw)`."""
    draw = np.random.default_rng(seed)
    (out / name).mkdir(parents=True)
    for fold in range(folds):
        true = draw.integers(0, 2, n).astype(bool)
        tfidf = true + draw.normal(0, 1.2, n)
        fields = {
            "prompts": [f"{fold}-{i // 2}" for i in range(n)],
            "labels": [{figures.UNSAFE: bool(flag)} for flag in true],
            "moderator": [{figures.UNSAFE: float(x)} for x in moderator(true, draw)],
            "tfidf": [{figures.UNSAFE: float(x)} for x in tfidf],
        }
        (out / name / f"fold-{fold}.json").write_text(json.dumps(fields))


def test_a_better_moderator_has_an_interval_above_0_and_one_at_chance_half(tmp_path):
    write_folds(tmp_path, "cs_rlhf", lambda true, draw: true + draw.normal(0, 0.6, len(true)))
    write_folds(tmp_path, "permuted", lambda true, draw: draw.normal(0, 1, len(true)))
    write_folds(tmp_path, "openai", lambda true, draw: draw.normal(0, 1, len(true)), folds=4)
    rows = figures.figures(tmp_path, "cs_rlhf", resamples=50)
    assert [row[1] for row in rows] == ["AUROC", "AP", "best F1"]
    for _, _, moderator, tfidf, difference, low, high, n in rows:
        assert 0 < low < difference < high and n == 2000
        assert difference == pytest.approx(moderator - tfidf)
    assert figures.figures(tmp_path, "permuted", resamples=2)[0][2] == pytest.approx(0.5, abs=0.04)
    assert figures.figures(tmp_path, "openai") == []


def test_the_interval_is_over_prompts_not_rows(tmp_path):
    """Twice the same rows of each prompt tell nothing new."""
    write_folds(tmp_path, "cs_rlhf", lambda true, draw: true + draw.normal(0, 1, len(true)), n=100)
    widths = []
    for _ in range(2):
        low, high = figures.figures(tmp_path, "cs_rlhf", resamples=200)[0][5:7]
        widths.append(high - low)
        for file in (tmp_path / "cs_rlhf").glob("*.json"):
            file.write_text(
                json.dumps({key: values * 2 for key, values in json.loads(file.read_text()).items()})
            )
    assert widths[1] == pytest.approx(widths[0], rel=1e-6)


def test_folds_and_labels():
    assert {figures.fold_of(str(i)) for i in range(50)} == set(range(figures.FOLDS))
    record = type("Record", (), {"unsafe": None, "categories": {"a": False, "b": None}})()
    assert figures.known_labels(record) == {"a": False}, "b is unknown, so safety is"
    record.categories = {"a": True, "b": None}
    assert figures.known_labels(record) == {"a": True, figures.UNSAFE: True}
    rows = [{"prompt": str(i), "response": "r", "label": i} for i in range(20)]
    shuffled = figures.shuffled(rows, "prompt")
    assert [row["prompt"] for row in shuffled] == [str(i) for i in range(20)]
    assert sorted(row["label"] for row in shuffled) == list(range(20))
    assert [row["label"] for row in shuffled] != list(range(20))
