"""What data files can hold, as the table of bad JSONL of docs/survival.md has it; padding, end tokens and ids
out of range.

The cases that are refused lie in bad_inputs.py, which also counts them.
"""

import json

import bad_inputs
import kit
import pytest
import torch

from saferlhf_fast.data.examples import preference_examples
from saferlhf_fast.models.causal_lm import load_causal_lm
from saferlhf_fast.models.score_model import score_model_from_backbone


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survival")
    return {name: kit.make_model(folder / name, architecture=name) for name in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def base(bases):
    return bases["llama"]


# ---------------------------------------------------------------- 17: JSONL


@pytest.mark.parametrize("case", bad_inputs.JSONL)
def test_bad_lines_are_refused_with_file_and_line(base, tmp_path, case):
    stage, content, fragment = bad_inputs.JSONL[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    problem = bad_inputs.refused(
        [stage, f"model={base}", f"data={path}"], [str(path), fragment], tmp_path / "out"
    )
    assert problem is None, problem


@pytest.mark.parametrize("case", bad_inputs.MODELS)
def test_models_that_could_run_something_are_refused(base, tmp_path, case):
    words, *fragments = bad_inputs.MODELS[case]
    paths = {
        **bad_inputs.untrusted(tmp_path, base),
        "sft": kit.write_rows(tmp_path / "sft.jsonl", [{"instruction": "what", "output": "yes"}]),
    }
    problem = bad_inputs.refused(words.format(**paths).split(" "), fragments, tmp_path / "runs" / "out")
    assert problem is None, problem


def load(tmp_path, content, kind="reward"):
    """Content of a file -> examples, report."""
    (tmp_path / "rows.jsonl").write_bytes(content)
    return preference_examples(str(tmp_path / "rows.jsonl"), kit.make_tokenizer(), "auto", 64, 0, kind)


def test_blank_lines_a_bom_and_nan_in_a_column_that_nobody_reads_change_nothing(tmp_path):
    good = bad_inputs.lines(bad_inputs.GOOD)
    expected, _ = load(tmp_path, good)
    for content in (
        b"\xef\xbb\xbf" + good,
        b"\n\n" + good + b"\n  \n",
        good.replace(b"\n", b"\r\n"),
        bad_inputs.lines({**bad_inputs.GOOD, "severity": float("nan")}),
    ):
        examples, report = load(tmp_path, content)
        assert examples[0].first_ids == expected[0].first_ids and report.kept == 1 and not report.dropped


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"rejected": "yes red"}, "the two responses are identical"),
        ({"chosen": ""}, "a response with no token"),
        ({"rejected": " \n"}, "a response with no token"),
    ],
)
def test_rows_of_no_use_are_counted(tmp_path, change, reason):
    examples, report = load(tmp_path, bad_inputs.lines(bad_inputs.CHOSEN, {**bad_inputs.CHOSEN, **change}))
    assert len(examples) == 1 and dict(report.dropped) == {reason: 1}


def test_text_comes_through_as_it_is(tmp_path):
    """No cast: what looks like a number, a date or nothing is the text that the file has."""
    for word in ("3", "null", "NaN", "2020-01-01", "true", "1e5"):
        (example,), _ = load(tmp_path, bad_inputs.lines({**bad_inputs.CHOSEN, "chosen": word}))
        assert example.first_text == word


# ---------------------------------------------------------------- 20: padding


def rows(lengths, ends):
    """Token ids of each row; the end token at the end of those in `ends`."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randint(4, 20, (n,), generator=draw).tolist() for n in lengths]
    return [row[:-1] + [2] if i in ends else row for i, row in enumerate(made)]


@pytest.mark.numeric
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pad", [3, 2], ids=["pad", "pad is eos"])
@pytest.mark.parametrize("ends", [(), (0, 1, 2, 3), (1, 2)], ids=["no eos", "eos", "some eos"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_and_log_probs_are_those_of_the_unpadded_run(bases, architecture, left, pad, ends):
    """Scores of every token, the score at the end and each token's log-prob; fp32, 1e-5. GPT-2 sees absolute
    positions.
    """
    base = bases[architecture]
    score = score_model_from_backbone(base).eval()
    lm = load_causal_lm(base).eval()
    texts = rows((9, 5, 7, 3), ends)
    longest = max(map(len, texts))
    padded = [[pad] * (longest - len(t)) + t if left else t + [pad] * (longest - len(t)) for t in texts]
    real = [
        [False] * (longest - len(t)) + [True] * len(t)
        if left
        else [True] * len(t) + [False] * (longest - len(t))
        for t in texts
    ]
    ids_BL, mask_BL = torch.tensor(padded), torch.tensor(real)
    positions_BL = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        scores_BL = score(ids_BL, mask_BL)
        end_B = score.end_scores(scores_BL, mask_BL)
        logits = lm(
            input_ids=ids_BL, attention_mask=mask_BL.long(), position_ids=positions_BL
        ).logits.log_softmax(-1)
        for i, ids in enumerate(texts):
            alone_1L = torch.tensor([ids])
            own = score(alone_1L, torch.ones_like(alone_1L))[0]
            assert torch.allclose(scores_BL[i][mask_BL[i]], own, atol=1e-5)
            assert torch.allclose(end_B[i], own[-1], atol=1e-5)
            own_logp = lm(input_ids=alone_1L).logits.log_softmax(-1)[0, :-1].gather(1, alone_1L[0, 1:, None])
            logp = logits[i][mask_BL[i]][:-1].gather(1, alone_1L[0, 1:, None])
            assert torch.allclose(logp, own_logp, atol=1e-5)


@pytest.mark.numeric
def test_the_reward_lands_on_the_last_real_token():
    """Without KL and values the returns are the score, discounted from the last token of each row."""
    from saferlhf_fast.kernels.ppo_lag_advantage import ppo_lag_advantage

    lengths = (4, 1, 6)
    cu = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    zeros_N = torch.zeros(sum(lengths))
    scores = torch.tensor([2.0, -3.0, 5.0])
    made = ppo_lag_advantage(
        zeros_N,
        zeros_N,
        scores,
        None,
        zeros_N,
        None,
        None,
        cu_seqlens=cu,
        kl_coeff=0.0,
        gamma=0.5,
        lam=1.0,
        clip_score=None,
    )
    expected = torch.cat([score * 0.5 ** torch.arange(n - 1, -1, -1.0) for score, n in zip(scores, lengths)])
    found = made[1] if isinstance(made, tuple) else made.reward_returns_N
    assert torch.allclose(found, expected)


# ---------------------------------------------------------------- 24: ids out of range


@pytest.mark.parametrize("label", ["V", -1, -100])
def test_a_label_out_of_range_never_gets_a_number(label):
    from saferlhf_fast.kernels.linear_logprob import linear_logprob
    from saferlhf_fast.kernels.token_logprob import token_logprob

    size = 11
    bad = size if label == "V" else label
    logits_NV, hidden_NH, weight_VH = torch.randn(3, size), torch.randn(3, 8), torch.randn(size, 8)
    ids_N = torch.tensor([1, bad, 2])
    with pytest.raises(ValueError, match=f"expected 0 <= id < {size}, got {bad}"):
        token_logprob(logits_NV, ids_N)
    with pytest.raises(ValueError, match=f"expected 0 <= id < {size}, got {bad}"):
        linear_logprob(hidden_NH, weight_VH, ids_N)


def test_the_count_counts(tmp_path):
    """A case that is not refused is found: a good file, and a wrong word."""
    base = kit.make_model(tmp_path / "model")
    bad = bad_inputs.refused(
        ["sft", f"model={base}", "data=/no/where.jsonl"], ["another reason"], tmp_path / "out"
    )
    assert "expected 'another reason'" in bad
    assert json.loads((tmp_path / "out" / "finished.json").read_text()) == {"saferlhf-fast": "0.1.0"}
