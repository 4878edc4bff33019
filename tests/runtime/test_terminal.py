"""Help, errors and progress on terminals of every encoding, without what other libraries say."""

import contextlib
import io
import logging
import re
import subprocess
import sys
import warnings

import pytest
from kit import shared

from saferlhf_fast.cli import COMMANDS, main
from saferlhf_fast.runtime import console, quiet_libraries
from saferlhf_fast.runtime.terminal import SPELLED, make_readable

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "koi8-r", "shift_jis", "gbk", "utf-8", "utf-16"]


@contextlib.contextmanager
def terminal(encoding):
    """stdout and stderr of an encoding, strict -> {name: text}, which is filled at the end."""
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    out, err = (io.TextIOWrapper(raw[name], encoding=encoding, write_through=True) for name in raw)
    text = {}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield text
    text |= {name: stream.getvalue().decode(encoding) for name, stream in raw.items()}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_help_can_be_printed(encoding):
    with terminal(encoding) as text:
        for words in ([], *([command] for command in COMMANDS if command != "bench")):
            assert main([*words, "--help"]) == 0
    shown = text["stdout"].replace("≤", "<=")
    assert "usage: saferlhf-fast COMMAND [recipe.yaml] [key=value " in shown and "cost <= threshold" in shown
    assert not re.search(r"\\[ux]", shown), "this package's own characters are spelled, not escaped"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_errors_name_what_was_given(encoding, tmp_path):
    with terminal(encoding) as text:
        assert main(["sft", "model=日本", f"data={tmp_path}", "output=x"]) == 2
        assert main(["sft", "optim.λ=1"]) == 2
        assert main(["sft", "--\udce9=1"]) == 2  # a byte that the locale cannot decode
    shown = text["stderr"]
    assert shown.count("error: ") == 3 and shown.count("\n") == 3
    assert "日本 does not exist" in shown.replace("\\u65e5\\u672c", "日本") and "\\udce9" in shown


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_progress_and_samples_can_be_printed(encoding):
    with terminal(encoding) as text:
        with console.track(2, "ppo") as bar:
            bar.advance(tokens=10, line="λ 1.0")
            console.step_line(1, 2, {"reward": 1.0, "lambda": 2.0})
        console.sample_table([{"prompt": "日本 é", "response": "…\udc80", "reward": 1.0}])
        console.result_table("Δ", ("policy", "λ"), [("SFT", None)])
    shown = text["stdout"].replace("lambda", "λ")
    assert "reward   1.000" in shown and "λ   2.000" in shown and "?" not in shown


def test_a_bar_on_a_terminal_without_unicode(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    raw = io.BytesIO()
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stdout(Terminal(raw, encoding="ascii", write_through=True)):
        with console.track(1, "ppo λ") as bar:
            bar.advance(tokens=10, line="λ 1.0")
        console.sample_table([{"prompt": "é", "response": "λ", "reward": 1.0}])
        text = raw.getvalue().decode("ascii")
    assert "lambda 1.0" in text and "1/1" in text and "\\u" not in text


def test_the_spelling_of_a_character_is_ascii():
    assert all(spelled.isascii() and spelled for spelled in SPELLED.values())
    make_readable(None, io.StringIO())  # what is no stream of an encoding stays as it is


def test_other_libraries_do_not_speak(monkeypatch, caplog):
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        levels = {name: logging.getLogger(name).level for name in quiet_libraries.LIBRARIES}
        try:
            quiet_libraries.quiet_libraries()
            for module in ("bitsandbytes.backends.cpu.ops", "transformers.trainer", "peft", "torch.utils"):
                logging.getLogger(module).warning("install kernels")
                warnings.warn_explicit("old", FutureWarning, "x.py", 1, module=module)
            assert not seen and not caplog.records
            warnings.warn_explicit("new", UserWarning, "x.py", 1, module="saferlhf_fast.data")
            logging.getLogger("peft").error("broken")
            assert len(seen) == len(caplog.records) == 1
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@pytest.mark.slow
@pytest.mark.skipif(shared() is None, reason="needs models/stories260k under SAFERLHF_DATA")
def test_a_run_with_lora_writes_nothing_to_standard_error(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "Hi", "completion": "Yo"}\n')
    model = shared() / "models" / "stories260k"
    words = f"sft model={model} data={tmp_path}/d.jsonl output={tmp_path}/o lora.rank=2 log.trackers=[]"
    done = subprocess.run(
        [sys.executable, "-m", "saferlhf_fast", *words.split(), "train.max_steps=1"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
