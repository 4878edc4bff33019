"""Bad inputs, each through the command line: python tests/support/bad_inputs.py prints how many were refused.

Refused means: the exit code is 2, one line says where and what is wrong, and a finished run in the output
folder is unchanged. The cases are those of test_bad_input.py, those of data files (JSONL) and those of models
(MODELS).
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import kit

GOOD = kit.pair("what is red", "yes red", "harm red", 0)
CHOSEN = {"prompt": "what is red", "chosen": "yes red", "rejected": "harm red"}


def lines(*rows):
    """Rows as JSON lines; a row that is text is written unchanged."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def without(row, name):
    """A copy of a row without one field."""
    return {key: value for key, value in row.items() if key != name}


JSONL = {
    "a broken line": ("reward", lines(GOOD, GOOD, '{"prompt": "what", '), "line 3: not JSON"),
    "a truncated last line": ("reward", lines(GOOD, GOOD)[:-20], "line 2: not JSON"),
    "an empty file": ("reward", b"", "is empty"),
    "a number where text belongs": (
        "reward",
        lines(GOOD, {**GOOD, "response_1": 3}),
        "line 2, field 'response_1': expected text, got the number 3",
    ),
    "a missing column": ("reward", lines(GOOD, without(GOOD, "response_1")), "line 2: no field 'response_1'"),
    "null": (
        "reward",
        lines(GOOD, {**GOOD, "response_1": None}),
        "line 2, field 'response_1': expected text, got null",
    ),
    "invalid UTF-8": ("reward", lines(GOOD) + b'{"prompt": "caf\xe9"}\n', "line 2: expected UTF-8"),
    "NaN for a label": (
        "reward",
        lines(GOOD, json.dumps(GOOD).replace('"better_response_id": 0', '"better_response_id": NaN')),
        "line 2, field 'better_response_id': expected 0 or 1",
    ),
    "NaN where text belongs": (
        "reward",
        lines(GOOD, json.dumps({**GOOD, "prompt": float("nan")})),
        "line 2, field 'prompt': expected text",
    ),
    "text for a label": (
        "reward",
        lines(GOOD, {**GOOD, "better_response_id": "1"}),
        "line 2, field 'better_response_id': expected 0 or 1",
    ),
    "no chosen": ("reward", lines(CHOSEN, without(CHOSEN, "chosen")), "line 2: no field 'chosen'"),
    "chosen is null": ("reward", lines(CHOSEN, {**CHOSEN, "chosen": None}), "line 2, field 'chosen'"),
    "no safety label": (
        "cost",
        lines(GOOD, without(GOOD, "is_response_1_safe")),
        "line 2: no field 'is_response_1_safe'",
    ),
    "no safety label at all": ("cost", lines(CHOSEN, CHOSEN), "no usable preference"),
    "a safety label is null": (
        "cost",
        lines(GOOD, {**GOOD, "is_response_0_safe": None}),
        "line 2, field 'is_response_0_safe': expected true or false, got null",
    ),
    "a safety label is a number that is neither 0 nor 1": (
        "cost",
        lines(GOOD, {**GOOD, "is_response_0_safe": 2}),
        "line 2, field 'is_response_0_safe'",
    ),
    "all chosen are rejected": (
        "reward",
        lines({**CHOSEN, "rejected": "yes red"}),
        "the two responses are identical",
    ),
    "all chosen are empty": ("reward", lines({**CHOSEN, "chosen": ""}), "a response with no token"),
}
"""{name: (stage, content of its data file, words that the one line must have)}"""

MODELS = {
    "weights in a pickle alone": ("sft model={pickled} data={sft}", "as a pickle alone"),
    "an index that leads out of the folder": (
        "sft model={indexed} data={sft}",
        "expected a file of this folder",
    ),
    "code beside a model": ("sft model={remote} data={sft}", "trust_remote_code"),
}


def world(folder):
    """Makes the files of all cases; returns {name: path} for the placeholders in their commands."""
    import test_bad_input

    base = kit.make_model(folder / "model")
    paths = {
        "folder": folder,
        "model": base,
        **kit.make_scores(folder, base),
        **kit.make_data(folder / "data"),
        **test_bad_input.bad_models(folder, base),
        **test_bad_input.bad_data(folder),
    }
    return {**paths, **untrusted(folder, base)}


def untrusted(folder, base):
    """Makes models that could run code or read outside of their folder; returns {name: path}."""
    import shutil

    import torch
    from safetensors.torch import load_file

    folders = {name: Path(shutil.copytree(base, folder / name)) for name in ("pickled", "indexed", "remote")}
    torch.save(load_file(folders["pickled"] / "model.safetensors"), folders["pickled"] / "pytorch_model.bin")
    (folders["pickled"] / "model.safetensors").unlink()
    (folders["indexed"] / "model.safetensors").rename(folders["indexed"] / "other.safetensors")
    (folders["indexed"] / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../model/model.safetensors"}})
    )
    config = json.loads((folders["remote"] / "config.json").read_text())
    (folders["remote"] / "config.json").write_text(
        json.dumps(
            {
                **config,
                "model_type": "strange",
                "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
            }
        )
    )
    (folders["remote"] / "code.py").write_text("raise SystemExit('it ran')\n")
    return {name: str(path) for name, path in folders.items()}


def cases(paths):
    """Yields (name, words of the command, fragments of the line)."""
    import test_bad_input

    for name, (words, *fragments) in {**test_bad_input.CASES, **MODELS}.items():
        yield (
            name,
            [word.format(**paths) for word in words.split(" ")],
            [fragment.format(**paths) for fragment in fragments],
        )
    for number, (name, (stage, content, fragment)) in enumerate(JSONL.items()):
        path = Path(paths["folder"]) / f"bad-{number}.jsonl"
        path.write_bytes(content)
        yield name, [stage, f"model={paths['model']}", f"data={path}"], [str(path), fragment]


def refused(words, fragments, output):
    """Runs a command over a finished run; returns what is wrong with the refusal, None if nothing is."""
    (output / "model").mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "versions.json", "finished.json", "sentinel", "model/model.safetensors"):
        (output / name).write_text('{"saferlhf-fast": "0.1.0"}')
    before, err = kit.files(output), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = kit.main(*words, f"output={output}", "overwrite=true")
    line = err.getvalue()
    if code != 2 or not line.startswith("error: ") or line.count("\n") != 1:
        return f"exit code {code}: {line[-300:]}"
    missing = [fragment for fragment in fragments if fragment not in line]
    if missing:
        return f"expected {missing[0]!r} in {line}"
    return None if kit.files(output) == before else "the finished run has changed"


def main():
    """Prints each case that was not refused correctly, and how many were refused."""
    with tempfile.TemporaryDirectory() as folder:
        paths, tried, bad = world(Path(folder)), 0, 0
        for name, words, fragments in cases(paths):
            problem, tried = refused(words, fragments, Path(folder) / "runs" / "out"), tried + 1
            if problem:
                bad += 1
                print(f"{name}: {problem}")
    print(f"{tried - bad} of {tried} bad inputs refused: exit code 2, one line, nothing lost")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path[:0] = [str(kit.ROOT), str(kit.ROOT / "tests" / "config")]  # of test_bad_input.py
    sys.exit(main())
