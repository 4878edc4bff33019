"""How good moderators from small pretrained weights are on public data, beside TF-IDF on the same rows.

    python bench/moderation_figures.py OUT --root DATA --model .models/all-MiniLM-L6-v2
    python bench/moderation_figures.py OUT --root DATA --model … --sections openai permuted
    python bench/moderation_figures.py OUT --table          # of what OUT has so far

DATA holds the files of SECTIONS. The folds are int(sha256(prompt)) mod 5; every figure is of scores out of
fold, pooled. A moderator is trained by `moderation train` with the settings of its section, which were fixed
before any fold was measured; nothing is tuned on a fold. The difference to TF-IDF (words or words and
characters with logistic regression, the best setting that is known for each data set) is paired: the same
rows, resampled by prompt 1,000 times. A fold's scores are written to OUT as soon as they are known, and a
repeated command goes on with the next one.
"""

import argparse
import csv
import datetime
import gzip
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.pipeline import make_pipeline, make_union

TREE = Path(__file__).resolve().parents[1]
FOLDS = 5
RESAMPLES = 1000
UNSAFE = "severity>0"  # the moderator's name of that output


@dataclass(frozen=True)
class Section:
    """One data set, how a moderator is trained on it, and the TF-IDF to compare it with."""

    file: str
    prompt: str  # the column that the folds are made of
    settings: tuple[str, ...]  # of `moderation train`
    tfidf: dict = field(default_factory=dict)  # text (response, both), characters, C, weights
    permuted: bool = False  # the labels of the training rows are shuffled


FINE_TUNED = (
    "features=ngrams",
    "train.epochs=3",
    "train.batch_size=16",
    "train.max_length=256",
    "optim.learning_rate=5e-5",
)
HEADS_ALONE = (
    "features=ngrams",
    "train_backbone=false",
    "train.epochs=10",
    "train.batch_size=32",
    "train.max_length=256",
    "optim.learning_rate=1e-3",
)
CS = "data/moderation/cs_rlhf_qa_safe_unsafe.jsonl.gz"
SECTIONS = {
    "cs_rlhf": Section(CS, "prompt", FINE_TUNED, {"text": "both", "characters": True, "C": 10}),
    "openai": Section(
        "data/moderation/openai_moderation_1680.jsonl.gz", "prompt", HEADS_ALONE, {"text": "prompt", "C": 10}
    ),
    "permuted": Section(
        CS, "prompt", HEADS_ALONE, {"text": "both", "characters": True, "C": 10}, permuted=True
    ),
    "do_not_answer": Section(
        "data/moderation/do_not_answer_en_6models.csv.gz",
        "question",
        HEADS_ALONE,
        {"text": "response", "C": 10, "weights": "balanced"},
    ),
}


def fold_of(prompt):
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % FOLDS


def read_rows(path):
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if ".csv" in path.name else [json.loads(line) for line in file]


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def shuffled(rows, prompt, seed=0):
    """The rows with the labels of other rows: what is no text is moved as a whole."""
    texts = {prompt, "prompt", "response"}
    labels = [{key: value for key, value in row.items() if key not in texts} for row in rows]
    random.Random(seed).shuffle(labels)
    return [{**row, **label} for row, label in zip(rows, labels)]


def run(words, log):
    """Runs a command of the package; ends this one, with its last lines, if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TREE), os.environ.get("PYTHONPATH", "")])}
    with open(log, "w") as file:
        command = [sys.executable, "-m", "saferlhf_fast", *words]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        sys.exit(f"{shlex.join(words)}: exit code {code}\n" + "".join(Path(log).read_text()[-2000:]))


def records_of(path, text):
    """(prompts, texts to vectorise, {output: label} of each), in the order of `moderation evaluate`."""
    from saferlhf_fast.data.moderation_records import read_moderation_records

    records = read_moderation_records(str(path))
    prompts, answers = ([getattr(record, name) for record in records] for name in ("prompt", "response"))
    chosen = {"response": answers, "prompt": prompts, "both": [f"{p}\n{a}" for p, a in zip(prompts, answers)]}
    return prompts, chosen[text], [known_labels(record) for record in records]


def known_labels(record):
    """{output: label} of what is known: where safety is not labelled, the categories give it."""
    labels = {name: flag for name, flag in record.categories.items() if flag is not None}
    unsafe = record.unsafe
    if unsafe is None and labels:
        unsafe = True if any(labels.values()) else False if len(labels) == len(record.categories) else None
    return labels if unsafe is None else {**labels, UNSAFE: unsafe}


def vectoriser(characters):
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    if not characters:
        return words
    return make_union(
        words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)
    )


def tfidf_scores(recipe, train_texts, train_labels, test_texts):
    """{output: probability of each test row}; an output without both classes in training is left out."""
    scores = {}
    for output in sorted({name for labels in train_labels for name in labels}):
        known = [i for i, labels in enumerate(train_labels) if output in labels]
        true = [train_labels[i][output] for i in known]
        if len(set(true)) < 2:
            continue
        model = make_pipeline(
            vectoriser(recipe.get("characters", False)),
            LogisticRegression(C=recipe["C"], class_weight=recipe.get("weights"), max_iter=2000),
        )
        model.fit([train_texts[i] for i in known], true)
        scores[output] = model.predict_proba(test_texts)[:, 1].tolist()
    return scores


def labels_of(model, path, folder, log):
    """The moderator's predictions of a file: rows with probabilities and labels."""
    run(
        [
            "moderation",
            "evaluate",
            f"model={model}",
            f"data={path}",
            f"output={folder}",
            "prompt_only=false",
            "overwrite=true",
        ],
        log,
    )
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


def measure_fold(name, section, fold, out, args):
    """Trains, measures and writes one fold."""
    folder = out / name / f"fold-{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rows(args.root / section.file)[: args.rows]
    suffix = ".csv" if ".csv" in section.file else ".jsonl"
    test, train = (folder / f"{part}{suffix}" for part in ("test", "train"))
    chosen = [row for row in rows if fold_of(row[section.prompt]) != fold]
    write_rows(train, shuffled(chosen, section.prompt) if section.permuted else chosen)
    write_rows(test, [row for row in rows if fold_of(row[section.prompt]) == fold])
    started = time.monotonic()
    run(
        [
            *("moderation", "train", f"model={args.model}", f"data={train}", f"output={folder / 'run'}"),
            *("resume=auto", *section.settings, *args.settings),
        ],
        folder / "train.log",
    )
    seconds = time.monotonic() - started
    model = folder / "run" / "model"
    predictions = labels_of(model, test, folder / "quality", folder / "evaluate.log")
    prompts, texts, labels = records_of(test, section.tfidf["text"])
    _, train_texts, train_labels = records_of(train, section.tfidf["text"])
    if [row["labels"].get(UNSAFE) for row in predictions] != [row.get(UNSAFE) for row in labels]:
        sys.exit(f"{name}, fold {fold}: the rows of the moderator are not those of TF-IDF")
    tfidf = tfidf_scores(section.tfidf, train_texts, train_labels, texts)
    result = {
        "seconds": round(seconds),
        "prompts": prompts,
        "labels": labels,
        "moderator": [row["probabilities"] for row in predictions],
        "tfidf": [{output: values[i] for output, values in tfidf.items()} for i in range(len(prompts))],
    }
    done = out / name / f"fold-{fold}.json"
    done.with_suffix(".partial").write_text(json.dumps(result))
    done.with_suffix(".partial").replace(done)
    return seconds


def best_f1(true, scores):
    precision, recall, _ = precision_recall_curve(true, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


MEASURES = {"AUROC": roc_auc_score, "AP": average_precision_score, "best F1": best_f1}


def pooled(out, name):
    """(prompts, {output: (rows, true, moderator, tfidf)}) of all folds; None where one is missing."""
    files = [out / name / f"fold-{fold}.json" for fold in range(FOLDS)]
    if not all(file.is_file() for file in files):
        return None
    folds = [json.loads(file.read_text()) for file in files]
    joined = {
        key: sum((fold[key] for fold in folds), []) for key in ("prompts", "labels", "moderator", "tfidf")
    }
    table = {}
    for output in joined["moderator"][0]:
        rows = [
            i
            for i, labels in enumerate(joined["labels"])
            if output in labels and output in joined["tfidf"][i]
        ]
        true = np.array([joined["labels"][i][output] for i in rows])
        if len(set(true.tolist())) == 2:
            pick = (np.array([joined[side][i][output] for i in rows]) for side in ("moderator", "tfidf"))
            table[output] = (np.array(rows), true, *pick)
    return joined["prompts"], table


def macro(measure, table, weights):
    """(moderator, TF-IDF): a measure's mean over the outputs; weights: how often each row counts."""
    values = []
    for rows, true, *sides in table:
        times = weights[rows]
        repeated = np.repeat(np.arange(len(rows)), times)
        if len(set(true[repeated].tolist())) == 2:
            values.append([measure(true[repeated], side[repeated]) for side in sides])
    return np.mean(values, axis=0)


def figures(out, name, resamples=RESAMPLES, seed=0):
    """Rows of the table of one section: (outputs, measure, moderator, TF-IDF, difference, low, high, n)."""
    found = pooled(out, name)
    if found is None:
        return []
    prompts, table = found
    groups = {"unsafe": [table[UNSAFE]]} if UNSAFE in table else {}
    categories = [
        value for key, value in table.items() if key != "refusal" and not key.startswith("severity>")
    ]
    if categories:
        groups[f"mean of {len(categories)} categories"] = categories
    places = np.unique(prompts, return_inverse=True)[1]
    draw, rows = np.random.default_rng(seed), []
    draws = [np.bincount(draw.integers(0, places.max() + 1, places.max() + 1), minlength=places.max() + 1)
             for _ in range(resamples)]  # fmt: skip
    for group, values in groups.items():
        known = {row for rows_of_output, *_ in values for row in rows_of_output.tolist()}
        for label, measure in MEASURES.items():
            moderator, tfidf = macro(measure, values, np.ones(len(prompts), dtype=int))
            differences = [float(np.subtract(*macro(measure, values, times[places]))) for times in draws]
            low, high = np.quantile(differences, [0.025, 0.975])
            rows.append((group, label, moderator, tfidf, moderator - tfidf, low, high, len(known)))
    return rows


def write_table(out, args):
    """Writes and prints OUT/table.md and OUT/figures.json."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=TREE, capture_output=True, text=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": f"{os.cpu_count()} CPU cores",
        "command": shlex.join(["python", "bench/moderation_figures.py", *sys.argv[1:]]),
    }
    lines = [
        "| data | output | measure | moderator | TF-IDF | difference (95 %) | rows |",
        "|---|---|---|---|---|---|---|",
    ]
    results = {}
    for name in SECTIONS:
        rows = results[name] = figures(out, name, args.resamples)
        for group, label, moderator, tfidf, difference, low, high, n in rows:
            gap = f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"
            lines.append(f"| {name} | {group} | {label} | {moderator:.3f} | {tfidf:.3f} | {gap} | {n} |")
        if not rows:
            lines.append(f"| {name} | | | not measured | | | |")
    text = "\n".join([", ".join(f"{key}: {value}" for key, value in about.items()), "", *lines, ""])
    (out / "table.md").write_text(text)
    (out / "figures.json").write_text(json.dumps({**about, "sections": results}, indent=1, default=float))
    print(text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", type=int, help="read only the first rows of each file: a rehearsal")
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    parser.add_argument(
        "--settings", nargs="*", default=[], help="settings of `moderation train` besides: a rehearsal"
    )
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    args = parser.parse_args(argv)
    if not args.table:
        if args.root is None or args.model is None:
            parser.error("expected --root and --model")
        todo = [
            (n, f)
            for n in args.sections
            for f in range(FOLDS)
            if not (args.out / n / f"fold-{f}.json").is_file()
        ]
        started = time.monotonic()
        for done, (name, fold) in enumerate(todo):
            seconds = measure_fold(name, SECTIONS[name], fold, args.out, args)
            left = (time.monotonic() - started) / (done + 1) * (len(todo) - done - 1)
            print(
                f"{name} fold {fold}: {seconds:.0f} s of training; about {left / 60:.0f} minutes left",
                flush=True,
            )
    write_table(args.out, args)


if __name__ == "__main__":
    main()
