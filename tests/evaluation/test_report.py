"""The page holds the run's numbers, needs nothing from elsewhere; what a model wrote cannot break it."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from saferlhf_fast.demo.report import claims_text, read_seeds, write_demo_report
from saferlhf_fast.errors import UserError
from saferlhf_fast.evaluation.report import curves, plots, run_report, write_report
from saferlhf_fast.evaluation.report.read import Run, read_lines, read_run
from saferlhf_fast.evaluation.report.scatter import counts, scatter

NASTY = "</td><script>alert(1)</script> \x1b[2J & <b>"


def ppo_rows(steps=40, constrained=True):
    """Rows of metrics.jsonl: a step each, an evaluation every 20."""
    rows = [
        {
            "step": 0,
            "time": 0.1,
            "eval/reward": 0.0,
            "eval/kl": 0.0,
            "eval/length": 9.0,
            **({"eval/cost": 1.0} if constrained else {}),
        }
    ]
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "time": step / 2,
                "train/reward": step / 10,
                "train/kl_divergence": step / 50,
                "train/mean_generated_length": 9.0,
                "train/max_generated_length": 14.0,
                "train/actor_loss": 0.1,
                "train/reward_critic_loss": 1 / step,
            }
        )
        if constrained:
            rows[-1] |= {
                "train/cost": 1 - step / 20,
                "train/episode_cost": 1.1 - step / 20,
                "train/lambda": 1 + step / 40,
                "train/cost_critic_loss": 2 / step,
                "train/unsafe_share": 0.5,
            }
            if step % 20 == 0:
                rows.append(
                    {
                        "step": step,
                        "time": step / 2,
                        "eval/reward": step / 10,
                        "eval/cost": 1 - step / 20,
                        "eval/threshold": -0.25,
                        "gold/cost": 0.5,
                        "gold/unsafe_share": 0.4,
                        "gold/helpfulness": 1.0,
                    }
                )
    rows[5]["train/reward"] = None  # a NaN as metrics.jsonl has it
    return rows


def make_run(folder, stage="ppo-lag", rows=None, after=True):
    """Writes a run folder -> its path."""
    folder.mkdir(parents=True)
    rows = ppo_rows() if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"stage: {stage}\nseed: 7\nmodel: '<i>x</i>'\n")
    (folder / "versions.json").write_text(
        json.dumps({"torch": "2.13.0", "seed": 7, "git_commit": "abcdef0123456-dirty"})
    )
    (folder / "summary.json").write_text(
        json.dumps({"steps": 40, "kept_step": 20, "eval/loss": 0.5, "threshold": None})
    )
    if after:
        before = [
            {"prompt": f"p{i}", "response": "b", "reward": float(i % 2), "cost": 1.0, "kl": 0.0, "length": 5}
            for i in range(8)
        ]
        rows = [
            {
                **row,
                "response": NASTY if i == 0 else "a",
                "reward": 2.0 if i < 6 else 0.0,
                "cost": -1.0 if i < 5 else 0.5,
            }
            for i, row in enumerate(before)
        ]
        (folder / "evaluation_before.json").write_text(json.dumps(before))
        (folder / "evaluation_after.json").write_text(json.dumps(rows))
    return folder


class Page(HTMLParser):
    """Collects what a page refers to, its ids and its text; notes elements closed in the wrong order."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.words, self.wrong = [], [], [], [], [], []
        self.feed(text)
        assert not self.wrong and not self.open, (self.wrong, self.open)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self._note(attributes)

    def _note(self, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href", "srcset", "data"):
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def check_alone(text):
    """Nothing from elsewhere, nothing that runs, every reference has its one target -> Page."""
    page = Page(text)
    assert "http" not in text and "@import" not in text
    assert not {"script", "iframe", "object", "link", "img"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert page.links and {link.lstrip("#") for link in page.links} <= set(page.ids)
    return page


@pytest.fixture(scope="module")
def lag(tmp_path_factory):
    """A written report of a PPO-Lag run -> its folder."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "lag")
    assert write_report(folder) == folder / "report.html"
    return folder


def test_page_stands_alone_and_is_well_formed(lag):
    page = check_alone((lag / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 6
    assert "prefers-color-scheme: dark" in page.text


def test_page_has_the_final_numbers(lag):
    text = Page((lag / "report.html").read_text(encoding="utf-8")).text
    assert "0.500 → 1.500" in text  # mean reward before and after
    assert "100.0 % → 37.5 %" in text  # cost above 0
    assert "-0.250, within the noise" in text  # mean cost −0.4375 (−1.085 to 0.210)
    assert (
        "The policy of step 20 was kept" in text
        and "commit abcdef0123 with changes" in text
        and "seed 7" in text
    )
    assert "37.5 (13.7 to 69.4)" in text  # Wilson, 3 of 8
    assert "unsafe, better 4 (50.0 %) 1 (12.5 %)" in text and "safe, better 0 (0.0 %) 5 (62.5 %)" in text
    assert "torch 2.13.0" in text and "model: '<i>x</i>'" in text


@pytest.fixture
def without_plots(monkeypatch):
    """The page without its plots, which take 2 s to draw."""
    monkeypatch.setattr(run_report, "ppo_plots", lambda run: [])
    monkeypatch.setattr(run_report, "scatter", lambda *_: None)


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "costs, words, kind",
    [
        ([-0.6, -0.5, -0.4, -0.5], "met", "good"),
        ([0.1, 0.2, 0.3, 0.2], "not met", "bad"),
        ([-1.0, 0.4, -0.9, 0.3], "within the noise", ""),
        ([-0.1, 0.0, -0.3, -0.25], "within the noise", ""),
        ([-9.0], "within the noise", ""),
        ([-0.25] * 3, "met", "good"),
    ],
)
def test_a_threshold_is_met_only_where_the_interval_says_so(tmp_path, costs, words, kind):
    folder = make_run(tmp_path / "lag")
    rows = [
        {"prompt": "p", "response": "r", "reward": 1.0, "cost": cost, "kl": 0.1, "length": 3}
        for cost in costs
    ]
    (folder / "evaluation_after.json").write_text(json.dumps(rows))
    text = write_report(folder).read_text(encoding="utf-8")
    assert f'<b class="{kind}">-0.250, {words}</b>' in text
    assert "counts as met when the whole interval" in Page(text).text


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "evaluation, told",
    [
        ("{data: null, fraction: 0.0}", True),
        ("{data: held.jsonl, fraction: 0.0}", False),
        ("{data: null, fraction: 0.1}", False),
    ],
)
def test_evaluation_on_training_prompts_is_told(tmp_path, evaluation, told):
    folder = make_run(tmp_path / "lag")
    with open(folder / "config.yaml", "a") as file:
        file.write(f"evaluation: {evaluation}\n")
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert (
        "The evaluation prompts are training prompts, the first 8: evaluation.fraction is 0" in text
    ) == told


def test_rows_that_were_dropped_or_flagged_are_counted(tmp_path):
    rows = [{"step": 1, "time": 1, "train/loss": 1.0}]
    folder = make_run(tmp_path / "cost", "cost", rows, after=False)
    one = {
        "path": "a<b>.jsonl",
        "format": "pku",
        "available": 1200,
        "rows": 999,
        "kept": 588,
        "dropped": {"longer than max_length": 400, "no label": 11},
        "flagged": {"labels contradict": 7},
    }
    two = {
        "path": "c.jsonl",
        "format": "pku",
        "available": 5,
        "rows": 5,
        "kept": 5,
        "dropped": {},
        "flagged": {},
    }
    (folder / "summary.json").write_text(
        json.dumps({"steps": 1, "examples": 593, "data": {"sources": [one, two]}})
    )
    text = check_alone(write_report(folder).read_text(encoding="utf-8")).text
    assert (
        "a<b>.jsonl read of 1200 in the source 999 dropped longer than max_length 400 dropped no label 11 "
        "flagged labels contradict 7 used examples 588 c.jsonl read of 5 in the source 5 used examples 5"
    ) in text


def test_text_of_models_stays_text(lag):
    raw = (lag / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in raw and "\x1b" not in raw
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\x1b[2J &amp; &lt;b&gt;" in raw


def test_plots_lie_as_png(lag):
    found = {path.name: path.read_bytes() for path in (lag / "plots").iterdir()}
    assert set(found) == {
        f"{n}.png" for n in ("multiplier", "cost", "reward", "scatter", "length_kl", "losses")
    }
    for data in found.values():
        assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") > 600 and len(data) > 8000


def lines_of(ax):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}


def test_cost_stands_against_the_threshold_with_gold_beside(lag):
    run = read_run(lag)
    model, gold, shares = curves.cost(run).figure.axes
    drawn = lines_of(model)
    assert set(drawn["threshold d = -0.25"][1]) == {-0.25}
    assert drawn["J_C"] == (list(range(1, 41)), [1.1 - s / 20 for s in range(1, 41)])
    assert drawn["evaluation prompts"] == ([0, 20, 40], [1.0, 0.0, -1.0])
    assert lines_of(gold)["evaluation prompts"] == ([20, 40], [0.5, 0.5])
    assert lines_of(shares)["evaluation, gold"][1] == [40.0, 40.0]  # per cent
    assert all(
        ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc="left") for ax in (model, gold, shares)
    )


def test_multiplier_is_drawn_as_logged(lag):
    (ax,) = curves.multiplier(read_run(lag)).figure.axes
    assert list(lines_of(ax).values()) == [(list(range(1, 41)), [1 + s / 40 for s in range(1, 41)])]


def test_gaps_are_left_out(lag):
    steps, values = read_run(lag).curve("train/reward")
    assert 5 not in steps and len(steps) == 39 and all(map(math.isfinite, values))


def test_plain_ppo_has_no_cost_side(tmp_path):
    folder = make_run(tmp_path / "ppo", "ppo", ppo_rows(6, constrained=False), after=False)
    rows = [{"prompt": "p", "response": "r", "reward": 1.0, "cost": None, "kl": 0.1, "length": 3}] * 3
    for name in ("before", "after"):
        (folder / f"evaluation_{name}.json").write_text(json.dumps(rows))
    text = write_report(folder).read_text(encoding="utf-8")
    assert {p.stem for p in (folder / "plots").iterdir()} == {"reward", "length_kl", "losses"}
    page = check_alone(text)
    assert "threshold" not in page.text and "quadrant" not in page.text and "λ" not in page.text


def test_supervised_run(tmp_path):
    rows = [
        {
            "step": s,
            "time": s,
            "train/loss": 2 / s,
            "train/lr": 1e-4,
            "train/grad_norm": 1.0,
            "train/accuracy": 0.6,
            "train/accuracy_sign": 0.7,
        }
        for s in range(1, 31)
    ]
    rows.append({"step": 30, "time": 30, "eval/loss": 0.5, "eval/accuracy": 0.64, "eval/accuracy_sign": 0.8})
    folder = make_run(tmp_path / "cost", "cost", rows, after=False)
    page = check_alone(write_report(folder).read_text(encoding="utf-8"))
    assert (
        "pair accuracy 64.0 %" in page.text
        and "sign accuracy 80.0 %" in page.text
        and "eval/loss 0.500" in page.text
    )
    assert {p.stem for p in (folder / "plots").iterdir()} == {"loss", "accuracy"}
    pair, sign = curves.accuracy(Run(folder, rows, summary={"baseline/accuracy": 0.61})).figure.axes
    assert lines_of(pair)["evaluation"] == ([30], [64.0]) and "TF-IDF baseline, 61 %" in lines_of(pair)
    assert len(sign.get_lines()) == 3


def test_only_metrics_is_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.5, "train/loss": 1.0}\n')
    check_alone(write_report(tmp_path).read_text(encoding="utf-8"))


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl: expected the metrics of a run, found no such file"):
        write_report(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_lines(path) == [{"step": 1}]  # cut off while it was written
    path.write_text('{"step": 1}\nx\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: expected a JSON object, got 'x'"):
        write_report(tmp_path)


def test_quadrants_and_their_borders():
    rows = [{"reward": r, "cost": c} for r, c in ((1, 1), (0, 1), (1, 0), (0, -1), (2, -1))]
    assert counts(rows, 1.0) == {"unsafe, worse": 1, "unsafe, better": 1, "safe, worse": 1, "safe, better": 2}
    bad = [{"reward": math.nan, "cost": 1}, {"reward": None, "cost": 1}]
    plot = scatter([("Before", rows + bad), ("After", rows[:2])], -0.5)
    texts = [text.get_text() for text in plot.figure.axes[1].texts]
    # The start's mean reward is 0.8, also for the panel after.
    assert texts == [
        "unsafe, worse: 1 (50 %)",
        "unsafe, better: 1 (50 %)",
        "safe, worse: 0 (0 %)",
        "safe, better: 0 (0 %)",
    ]
    assert scatter([("Before", bad), ("After", rows)]) is None


def test_long_lines_are_thinned_and_smoothed():
    steps, values = plots.thinned(list(range(1, 5001)), [float(i) for i in range(5000)])
    assert len(steps) == 1000 and steps[-1] == 5000 and values[0] == 2.0
    assert plots.running_mean([1, 2, 3, 4], [4.0, 2.0, 6.0, 1.0], 2)[1] == [4.0, 3.0, 4.0, 3.5]


def policy(helpfulness, unsafe_share, model_cost):
    return {
        "helpfulness": helpfulness,
        "cost": 0.1,
        "unsafe_share": unsafe_share,
        "model_reward": 1.0,
        "model_cost": model_cost,
        "kl": 0.5,
        "multiplier": 0.25,
    }


def demo_result():
    good = {"sft": policy(1.0, 0.4, -1.0), "ppo": policy(1.5, 0.7, 1.0), "ppo_lag": policy(1.2, 0.125, -4.5)}
    return {
        "threshold": -4.0,
        "seeds": {
            "0": {**good, "seconds": {"sft": 10.0, "ppo": 20.5, "total": 30.5}},
            "1": {**good, "threshold": -5.0},
        },
    }


def test_demo_report(tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps(demo_result()))
    make_run(tmp_path / "seed-0" / "ppo", "ppo")
    make_run(tmp_path / "seed-0" / "ppo-lag")
    make_run(
        tmp_path / "seed-0" / "reward",
        "reward",
        [{"step": 1, "time": 1, "train/loss": 1.0, "train/accuracy": 0.5}],
        after=False,
    )
    for name in ("sft", "ppo", "ppo-lag"):
        (tmp_path / "seed-0" / f"test-{name}.jsonl").write_text(
            "".join(
                json.dumps({"prompt": f"p{i}", "response": NASTY, "reward": i, "cost": 1 - i}) + "\n"
                for i in range(4)
            )
        )
    page = check_alone(write_demo_report(tmp_path).read_text(encoding="utf-8"))
    assert "9 of 10" in page.text  # seed 1's cost is above its own threshold
    assert "PPO-Lag's model cost is at or under d yes no" in page.text
    assert "PPO-Lag 1.200 0.100 12.5 % 1.000 -4.500 -4.000 0.500 0.250" in page.text
    assert "alert(1)" in page.text and "ppo 20.5" in page.text
    assert {p.stem for p in (tmp_path / "plots").iterdir()} == {
        "tradeoff",
        "policies",
        "seed-0-training",
        "seed-0-scatter",
        "seed-0-stages",
    }


@pytest.mark.parametrize(
    "key, name, value",
    [
        ("ppo", "helpfulness", 0.9),
        ("ppo", "unsafe_share", 0.3),
        ("ppo_lag", "helpfulness", 1.0),
        ("ppo_lag", "model_cost", -3.9),
        ("ppo_lag", "unsafe_share", 0.4),
    ],
)
def test_each_claim_can_fail(key, name, value):
    entry = {**demo_result()["seeds"]["0"], "threshold": -4.0}
    assert claims_text({"0": entry}) == ("5 of 5", "good")
    entry[key][name] = value
    assert claims_text({"0": entry}) == ("4 of 5", "bad")


def test_broken_demo_is_named(tmp_path):
    with pytest.raises(UserError, match="demo.json: expected the demo's results"):
        write_demo_report(tmp_path)
    result = demo_result()
    del result["seeds"]["1"]["ppo_lag"]
    (tmp_path / "demo.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="seed 1: expected sft, ppo, ppo_lag, found no ppo_lag"):
        read_seeds(tmp_path / "demo.json")
