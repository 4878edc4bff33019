"""Bad inputs, each through the command line: python tests/support/bad_inputs.py prints how many were refused
as they should be.

Refused means: exit code 2, one line that says where and what, and a finished run that the command might have
replaced is left as it was. The table is that of test_bad_input.py with what data files can hold (JSONL) and
models (MODELS) beside it.
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
    """Rows as JSON lines; text stands for itself."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def without(row, name):
    """A row that lacks a field."""
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
    "a safety label is a number": (
        "cost",
        lines(GOOD, {**GOOD, "is_response_0_safe": 1}),
        "line 2, field 'is_response_0_safe'",
    ),
    "all chosen are rejected": (
        "reward",
        lines({**CHOSEN, "rejected": "yes red"}),
        "the two responses are identical",
    ),
    "all chosen are empty": ("reward", lines({**CHOSEN, "chosen": ""}), "a response with no token"),
}
"""Name -> stage, content of its data file, words that the one line must have."""

MODELS = {
    "weights in a pickle alone": ("sft model={pickled} data={sft}", "as a pickle alone"),
    "an index that leads out of the folder": (
        "sft model={indexed} data={sft}",
        "expected a file of this folder",
    ),
    "code beside a model": ("sft model={remote} data={sft}", "trust_remote_code"),
}


def world(folder):
    """{name: path} for the words of all cases."""
    import test_bad_input as others

    base = kit.make_model(folder / "model")
    made = {
        "folder": folder,
        "model": base,
        **kit.make_scores(folder, base),
        **kit.make_data(folder / "data"),
        **others.bad_models(folder, base),
        **others.bad_data(folder),
    }
    return {**made, **untrusted(folder, base)}


def untrusted(folder, base):
    """Models that could run something, or read elsewhere."""
    import shutil

    import torch
    from safetensors.torch import load_file

    made = {name: Path(shutil.copytree(base, folder / name)) for name in ("pickled", "indexed", "remote")}
    torch.save(load_file(made["pickled"] / "model.safetensors"), made["pickled"] / "pytorch_model.bin")
    (made["pickled"] / "model.safetensors").unlink()
    (made["indexed"] / "model.safetensors").rename(made["indexed"] / "other.safetensors")
    (made["indexed"] / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../model/model.safetensors"}})
    )
    config = json.loads((made["remote"] / "config.json").read_text())
    (made["remote"] / "config.json").write_text(
        json.dumps(
            {
                **config,
                "model_type": "strange",
                "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
            }
        )
    )
    (made["remote"] / "code.py").write_text("raise SystemExit('it ran')\n")
    return {name: str(path) for name, path in made.items()}


def cases(paths):
    """Yields (name, words of the command, fragments of the line)."""
    import test_bad_input as others

    for name, (words, *fragments) in {**others.CASES, **MODELS}.items():
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
    """Runs a command over a finished run -> what is wrong with how it was refused; None when all is well."""
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
    return None if kit.files(output) == before else "the run that was there has changed"


def main():
    """Prints each case that was not refused, and how many were."""
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
