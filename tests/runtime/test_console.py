"""Output is plain lines without a terminal, a progress bar with one, and only rank 0 prints."""

import contextlib
import io
import re

import pytest

from saferlhf_fast.runtime import console

STEP = {
    "reward": 1.25,
    "cost": -0.5,
    "lambda": 1.01,
    "kl_divergence": 0.3,
    "actor_loss": -0.00012,
    "mean_generated_length": 14.24,
    "reward_critic_loss": 9.0,
}


class Terminal(io.StringIO):
    """A stdout that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@contextlib.contextmanager
def terminal():
    """Prints inside of the context go to a terminal of 120 columns; yields its stream."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(Terminal()) as stream:
        for name, value in {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}.items():
            patch.setenv(name, value)
        yield stream


def is_plain(text):
    return not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_step_line_has_the_six_figures_on_one_line(capsys):
    console.step_line(7, 120, STEP)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and is_plain(out)
    assert (
        out.split()
        == ("step 7/120 reward 1.250 cost -0.500 λ 1.010 KL 0.300 loss -1.2e-04 length 14.2").split()
    )


def test_step_line_accepts_names_with_and_without_the_prefix_train(capsys):
    console.step_line(1, 2, {"train/reward": 2.0, "train/loss": float("nan"), "cost": None})
    assert capsys.readouterr().out.split() == "step 1/2 reward 2.000 loss nan".split()


def test_every_step_has_its_line_and_speed_in_plain_output(capsys):
    with console.track(5, "ppo") as bar:
        for step in range(1, 6):
            bar.advance(tokens=1000, line=console.step_line(step, 5, STEP))
    out = capsys.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in steps] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert all("tokens/s" in line and "left" in line for line in steps[1:])
    assert len(out.splitlines()) == 6 and is_plain(out)  # five steps and one line at the end


def test_plain_progress_prints_a_line_every_few_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.track(100, "sft") as bar:
        for step in range(100):
            now[0] += 0.25
            bar.advance(tokens=500, line=f"loss {step}")
    lines = capsys.readouterr().out.splitlines()
    # 25 seconds give one line every 5 seconds, the last step and the summary, not 100 lines.
    assert 6 <= len(lines) <= 8, lines
    assert "2,000 tokens/s" in lines[1] and "left" in lines[1] and "loss" in lines[1]
    assert lines[-1] == "sft: 100 steps in 0:25, 2,000 tokens/s"


def test_speed_and_time_left_are_computed_from_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.track(10, "x", enabled=False) as bar:
        for _ in range(4):
            now[0] += 2.0
            bar.advance(tokens=3000)
    assert bar.speed() == "1,500 tokens/s, 0:12 left"


def test_a_terminal_gets_a_bar_and_step_lines():
    with terminal() as stream, console.track(3, "ppo [x]") as bar:
        for step in range(1, 4):
            bar.advance(tokens=1000, line=console.step_line(step, 3, STEP))
    out = stream.getvalue()
    assert "\x1b[" in out and "3/3" in out and "tokens/s" in out and "ppo [x]" in out
    assert len(re.findall(r"step \d/3  reward", out)) == 3


def test_a_disabled_track_prints_nothing(capsys):
    with console.track(3, "x", enabled=False) as bar:
        bar.advance(tokens=3, line=console.step_line(1, 3, STEP))
        console.sample_table([{"prompt": "p", "response": "r", "reward": 1.0}])
    assert capsys.readouterr().out == ""
    console.step_line(1, 3, STEP)  # outside of the track it prints again
    assert capsys.readouterr().out


def test_ranks_other_than_0_print_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.say("a")
    console.warn("b")
    console.sample_table([{"prompt": "p", "response": "r"}])
    console.result_table("t", ["a"], [[1]])
    with console.track(2, "x") as bar:
        bar.advance(tokens=1, line=console.step_line(1, 2, STEP))
    assert capsys.readouterr().out == ""


def test_output_works_again_after_an_error_inside_a_track(capsys):
    with pytest.raises(KeyError):
        with console.track(2, "x", enabled=False):
            raise KeyError("a")
    console.say("still here")
    assert capsys.readouterr().out == "still here\n"


def test_a_track_inside_another_shows_nothing():
    with terminal() as stream, console.track(1, "outer") as outer, console.track(1, "inner") as inner:
        inner.advance()
        outer.advance()
    assert "inner" not in stream.getvalue() and "outer" in stream.getvalue()


NASTY = "a [red]b[/red] \x1b[2J\x07 c\nd\u202e e\ud800 [/]"


@pytest.mark.parametrize("on_terminal", [False, True])
def test_sample_text_is_escaped(on_terminal, capsys):
    rows = [{"prompt": NASTY, "response": "ok", "reward": 1.5, "cost": None}]
    if on_terminal:
        with terminal() as stream:
            console.sample_table(rows)
    else:
        console.sample_table(rows)
    out = stream.getvalue() if on_terminal else capsys.readouterr().out
    assert "\x1b[2J" not in out and "\x07" not in out and "\u202e" not in out
    assert "[red]b[/red]" in out and "\\x1b[2J\\x07" in out and "\\u202e" in out and "1.500" in out
    assert on_terminal or is_plain(out)


def test_long_samples_are_shortened():
    short = console.shorten("begin " + "x" * 5000 + " end")
    assert len(short) == console.LONGEST_TEXT and short.startswith("begin ") and short.endswith(" end")
    assert console.shorten("y" * console.LONGEST_TEXT) == "y" * console.LONGEST_TEXT


def test_messages_are_not_wrapped_and_not_read_as_markup(capsys):
    console.say("[bold]x[/bold] " + "word " * 60)
    console.warn("a/b:[1]")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[0].startswith("[bold]x[/bold]") and out[1] == "warning: a/b:[1]"


def test_result_table_is_aligned_in_plain_output(capsys):
    console.result_table("title", ["policy", "λ"], [["SFT", None], ["PPO-Lag 日本", 1.25]])
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "  policy             λ",
        "  SFT                –",
        "  PPO-Lag 日本  1.2500",
    ]


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0, "0.000"),
        (1234.5, "1234"),
        (-0.00012, "-1.2e-04"),
        (1e7, "1.0e+07"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_at_most_eight_characters(value, text):
    assert console.number(value) == text and len(text) <= 8


def test_seconds_are_shown_as_hours_minutes_and_seconds():
    assert [console.clock(s) for s in (0.4, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]
