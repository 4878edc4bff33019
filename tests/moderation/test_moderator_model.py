"""The moderator's heads and losses: monotone severities, masked labels, weights, n-grams, files, batches."""

import json
import math

import encoder_kit
import kit
import pytest
import torch

from saferlhf_fast.errors import UserError
from saferlhf_fast.models.moderator import ModeratorHead, ModeratorModel, severity_distribution
from saferlhf_fast.models.moderator_files import load_moderator, moderator_from_backbone, save_moderator
from saferlhf_fast.models.moderator_spec import Calibration, ModeratorSpec, read_spec
from saferlhf_fast.models.ngrams import FIELDS, NgramLayer, bags_of
from saferlhf_fast.models.tokenizer import load_tokenizer
from saferlhf_fast.moderation import Moderator
from saferlhf_fast.moderation.labels import Labels
from saferlhf_fast.moderation.losses import moderation_losses

SPEC = ModeratorSpec("toy", ("a", "b"), refusal=True, max_length=64)


def head(spec=SPEC, hidden=8, seed=0):
    torch.manual_seed(seed)
    made = ModeratorHead(hidden, spec)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, 2.0)
    return made


@pytest.mark.parametrize("sources", [(), ("x", "y", "z")])
def test_severity_is_monotone_for_any_weights_and_any_source(sources):
    spec = ModeratorSpec("toy", ("a",), sources=sources)
    states, numbers = torch.randn(50, 8) * 5, torch.arange(50) % 4 - 1
    for seed in range(20):
        model = head(spec, seed=seed)
        model.set_shares(torch.rand(4) * 100, torch.rand(4) * 100, cap=10.0)
        above = model(states, None, numbers)[:, spec.heads["severity"]].sigmoid()
        assert (above.diff(dim=1) <= 1e-12).all()
        distribution = severity_distribution(above)
        assert (distribution >= -1e-12).all() and torch.allclose(distribution.sum(1), torch.ones(50))
        expected = (distribution * torch.arange(4)).sum(1)
        assert torch.allclose(expected, above.sum(1), atol=1e-6)


def test_each_source_has_its_own_head_and_none_has_their_mean():
    model = head(ModeratorSpec("toy", ("a", "b"), sources=("x", "y")))
    states = torch.randn(5, 8)
    of_x, of_y = (model(states, None, torch.full((5,), i)) for i in range(2))
    assert not torch.allclose(of_x, of_y)
    for none in (None, torch.full((5,), -1)):
        assert torch.allclose(model(states, None, none), (of_x + of_y) / 2, atol=1e-5)


def labels_by_hand():
    true = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1]], dtype=torch.float32)
    known = torch.tensor([[1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    return Labels(true, known)


def test_losses_are_the_formulas_and_unknown_labels_have_no_gradient():
    labels, weights = labels_by_hand(), torch.tensor([3.0, 1.0, 1.5, 2.0, 4.0, 0.5]).double()
    logits = torch.randn(3, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    logits = logits.requires_grad_()
    got = moderation_losses(logits, labels, weights.log(), SPEC)
    for name, place in SPEC.heads.items():
        for row in range(3):
            total, columns = 0.0, range(*place.indices(6))
            for x in columns:
                if labels.known_SX[row, x]:
                    p = 1 / (1 + math.exp(-(logits[row, x] + weights[x].log()).item()))
                    y = float(labels.true_SX[row, x])
                    total -= float(weights[x]) * y * math.log(p) + (1 - y) * math.log(1 - p)
            assert got[name][row].item() == pytest.approx(total / len(columns), rel=1e-9)
    sum(values.sum() for values in got.values()).backward()
    assert (logits.grad[~labels.known_SX] == 0).all() and (logits.grad[labels.known_SX] != 0).all()
    with torch.no_grad():
        logits[~labels.known_SX] = float("inf")
    assert all(v.isfinite().all() for v in moderation_losses(logits, labels, weights.log(), SPEC).values())


def test_coral_loss_agrees_with_coral_pytorch():
    coral = pytest.importorskip("coral_pytorch.losses", reason="coral-pytorch is not installed")
    spec = ModeratorSpec()
    logits, levels = torch.randn(7, 3), torch.tensor([0, 1, 2, 3, 3, 0, 1])
    true = (levels[:, None] > torch.arange(3)).float()
    ours = moderation_losses(logits, Labels(true, torch.ones(7, 3, dtype=bool)), torch.zeros(3), spec)
    theirs = coral.coral_loss(logits, true, reduction=None)
    assert torch.allclose(3 * ours["severity"], theirs, atol=1e-6)


def test_weighted_training_gives_the_shares_of_the_data():
    """A head that knows nothing predicts how often a label is true, whatever its positives weigh."""
    positive, negative = torch.tensor([5.0, 0, 40, 20, 5, 90]), torch.tensor([95.0, 100, 60, 80, 95, 10])
    torch.manual_seed(0)
    model = ModeratorHead(4, SPEC)
    model.set_shares(positive, negative, cap=10.0)
    assert torch.allclose(model.log_weight.exp()[[0, 1, 4, 5]], torch.tensor([10.0, 1, 10, 1 / 9]), rtol=1e-3)
    states = torch.zeros(100, 4)
    shares = model(states)[0].sigmoid()
    assert torch.allclose(shares[[0, 2, 3, 4, 5]], torch.tensor([0.05, 0.4, 0.2, 0.05, 0.9]), atol=0.02)
    assert shares[1] < 0.01
    # and the minimum of the weighted loss is there: its gradient in the logits is zero
    true = torch.stack([(torch.arange(100) < count).float() for count in positive], 1)
    logits = (positive / 100).logit().clamp(-20, 20).expand(100, 6).clone().requires_grad_()
    losses = moderation_losses(logits, Labels(true, torch.ones(100, 6, dtype=bool)), model.log_weight, SPEC)
    sum(v.sum() for v in losses.values()).backward()
    assert logits.grad.sum(0).abs().max() < 1e-3


def test_ngrams_are_tf_idf_of_each_field():
    prompts, responses = ["How to Bake?", "", "how to"], ["flour and flour", "x", ""]
    bags = bags_of(prompts, responses, 1 << 12)
    layer = NgramLayer(1 << 12, 3, rate=2.0)
    torch.nn.init.normal_(layer.weight)
    layer.count_documents([*zip(prompts, responses), ("how to", "flour")])
    assert 0 < (layer.idf > 0).sum() < len(bags.buckets_E.unique()), "n-grams of one text alone do not count"
    got = layer(bags)
    assert bags.starts_S.tolist() == sorted(bags.starts_S.tolist()) and len(bags.starts_S) == 3
    for row in range(3):
        expected = torch.zeros(3)
        for field in range(FIELDS):
            chosen = bags.field_E == FIELDS * row + field
            if chosen.any():
                weights = bags.weights_E[chosen] * layer.idf[bags.buckets_E[chosen]]
                weights = weights / weights.norm().clamp(min=1e-9) * layer.scale[bags.buckets_E[chosen]]
                expected += weights @ layer.weight[bags.buckets_E[chosen]]
        assert torch.allclose(got[row], 2 * expected, atol=1e-5)
    # the same words in another case are the same; in the other field they are not
    assert torch.equal(bags.buckets_E, bags_of([p.upper() for p in prompts], responses, 1 << 12).buckets_E)
    swapped = layer(bags_of(responses, prompts, 1 << 12))
    assert not torch.allclose(swapped[0], got[0], atol=1e-3)


def saved(tmp_path, kind, **options):
    """A random moderator of a decoder or an encoder, saved; -> (folder, model)."""
    base = str(tmp_path / "base")
    pairs = kind != "llama"
    kit.make_model(base) if kind == "llama" else encoder_kit.make_encoder(base, kind)
    options = {"pooling": "mean" if pairs else "last", "pairs": pairs, **options}
    spec = ModeratorSpec("toy", ("a", "b"), refusal=True, max_length=100, **options)
    model = moderator_from_backbone(base, spec)
    with torch.no_grad():
        for weight in [
            *model.head.parameters(),
            *(() if model.ngrams is None else model.ngrams.parameters()),
        ]:
            weight.normal_(0, 0.5)
    calibration = Calibration(
        {"severity": 2.0, "categories": 0.5}, (0.1, 0.0, -0.1), {"balanced": {"a": 0.3}}
    )
    save_moderator(tmp_path / "model", model, load_tokenizer(base, pairs=pairs), calibration)
    return str(tmp_path / "model"), model


KINDS = {
    "decoder": ("llama", {}),
    "decoder, mean, ngrams": ("llama", {"pooling": "mean", "buckets": 512}),
    "bert": ("bert", {}),
    "roberta, ngrams": ("roberta", {"buckets": 512, "rate": 3.0}),
    "deberta, cls": ("deberta-v3", {"pooling": "cls"}),
    "modernbert, sources": ("modernbert", {"sources": ("x", "y")}),
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", KINDS)
def test_saved_moderator_gives_the_same_alone_and_in_any_batch(tmp_path, name):
    folder, model = saved(tmp_path, KINDS[name][0], **KINDS[name][1])
    moderator = Moderator.from_pretrained(folder)
    spec, calibration = read_spec(folder)
    assert spec == model.spec and moderator.calibration == calibration
    words = [w for w in kit.WORDS if w.islower()]
    prompts = [" ".join(words[i % 9 : i % 9 + i % 5 + 1]) for i in range(64)]
    responses = [" ".join(words[(3 * i + j) % 17] for j in range(1 + i % 30)) for i in range(64)]
    together = moderator(prompts, responses)
    for batch_tokens in (1, 100):
        other = Moderator(moderator.model, moderator.tokenizer, calibration, batch_tokens)
        for one, row in zip(together, other(prompts, responses)):
            assert one.expected_severity == pytest.approx(row.expected_severity, abs=1e-5)
            assert one.unsafe == pytest.approx(row.unsafe, abs=1e-5)
            assert list(one.categories.values()) == pytest.approx(list(row.categories.values()), abs=1e-5)
    assert len({round(row.unsafe, 6) for row in together}) > 30
    for row in together:
        assert sum(row.severity_distribution) == pytest.approx(1) and row.flagged == (row.severity > 0)
        assert row.flags == {c: p >= (0.3 if c == "a" else 0.5) for c, p in row.categories.items()}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_prefixes_end_with_the_whole_answer_and_equal_single_texts(tmp_path, kind):
    moderator = Moderator.from_pretrained(saved(tmp_path, kind, buckets=256)[0])
    prompt, response = "what is red", "yes no maybe one two three stop go help"
    rows = moderator.prefixes(prompt, response, every=2)
    whole = moderator(prompt, response)[0]
    assert rows[-1].unsafe == pytest.approx(whole.unsafe, abs=1e-6)
    counts = [row.tokens for row in rows]
    assert counts[:-1] == list(range(2, counts[-1], 2)) and counts[-1] >= 9
    if kind == "llama":  # each is the score of the cut text, without the end of its turn
        encoded = moderator.encode([prompt], [response])[0]
        for row in rows[:-1]:
            cut = encoded._replace(ids=encoded.ids[: encoded.prompt_length + row.tokens])
            text = moderator.tokenizer.decode(cut.ids[encoded.prompt_length :])
            alone = moderator.probabilities([cut], [prompt], [text])[0]
            assert row.unsafe == pytest.approx(float(alone[2]), abs=1e-5)
    with pytest.raises(UserError, match="every: expected at least 1"):
        moderator.prefixes(prompt, response, every=0)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_long_answer_is_judged_by_head_and_tail(tmp_path, kind):
    moderator = Moderator.from_pretrained(saved(tmp_path, kind)[0])
    filler, prompt = "red green blue " * (70_000 if kind == "llama" else 2_000), "what is one"
    texts = [f"harm {filler}", f"{filler} harm", filler, f"{filler} harm {filler}", "yes"]
    head_harm, tail_harm, plain, middle, short = moderator([prompt] * 5, texts)
    assert [v.truncated for v in (head_harm, tail_harm, plain, middle, short)] == [True] * 4 + [False]
    assert len({round(v.unsafe, 7) for v in (head_harm, tail_harm, plain)}) == 3
    long_prompt = moderator([filler], ["yes no"])[0]
    assert long_prompt.truncated
    assert all(len(item.ids) <= 100 for item in moderator.encode([filler, prompt], ["yes", filler]))


@pytest.mark.parametrize(
    "prompts, responses, message",
    [
        (["a"], ["b", "c"], "responses: expected 1, one for each prompt, got 2"),
        (["a"], [3], r"responses\[0\]: expected text, got int"),
        (["a", None], ["b", "c"], r"prompts\[1\]: expected text, got NoneType"),
        (["a\ud800"], ["b"], r"prompts\[0\]: expected Unicode text, got the lone surrogate \\ud800"),
    ],
)
def test_wrong_texts_are_named(tmp_path, prompts, responses, message):
    moderator = Moderator.from_pretrained(saved(tmp_path, "llama")[0])
    with pytest.raises(UserError, match=message):
        moderator(prompts, responses)
    with pytest.raises(UserError, match="preset: expected one of strict"):
        moderator("a", "b", preset="lenient")
    assert moderator([], []) == []


def test_what_is_no_moderator_is_refused_in_one_line(tmp_path):
    folder, _ = saved(tmp_path, "llama")
    with pytest.raises(UserError, match="expected a moderator"):
        Moderator.from_pretrained(tmp_path / "base")
    text = (tmp_path / "model" / "moderation.json").read_text()
    broken = {
        '"format": 1': ('"format": 7', "format: expected 1, got 7"),
        '  "b"\n': ('  "b", "c"\n', "moderator.head.weight: expected a weight"),
        '"severity": 2.0': ('"severity": -2.0', "temperatures: expected numbers above 0"),
        '"severity": 2': ('"severity": "x", "y": 2', "expected numbers"),
        "{": ("[", "is not JSON"),
    }
    for old, (new, message) in broken.items():
        assert old in text, old
        (tmp_path / "model" / "moderation.json").write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            load_moderator(folder)


def test_a_model_needs_texts_or_states(tmp_path):
    base = kit.make_model(tmp_path / "base")
    model = moderator_from_backbone(base, ModeratorSpec("t", ("a",), buckets=256))
    with pytest.raises(ValueError, match="packed and pooled_SH"):
        model(None)
    with pytest.raises(ValueError, match="bags"):
        model(None, pooled_SH=torch.zeros(1, 32))
    with pytest.raises(UserError, match="pooling: expected last or mean"):
        ModeratorModel(model.backbone, ModeratorSpec(pooling="cls"))


def test_what_people_cannot_see_changes_nothing(tmp_path):
    moderator = Moderator.from_pretrained(saved(tmp_path, "llama", buckets=256)[0])
    plain, odd = "yes  no maybe", "y\u200bes no\u00a0\t maybe\ufeff"
    assert moderator("a", plain)[0] == moderator("a", odd)[0]


SIGNALS = {
    "severity": {"signal": "expected_severity"},
    "severity of b": {"categories": ["b"]},
    "logit": {"signal": "unsafe_logit"},
    "logit of a, refusal": {"signal": "unsafe_logit", "categories": ["a"], "refusal": 2.0},
}


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_moderator_stands_where_a_cost_model_stands(tmp_path, signal):
    """The costs of `evaluate` are the moderator's own numbers of the sampled texts."""
    folder, _ = saved(tmp_path, "bert" if "logit" in signal else "llama", buckets=256)
    policy, data = kit.make_model(tmp_path / "policy", seed=3), kit.make_data(tmp_path / "data", n=6)
    spec = json.dumps({"kind": "moderator", "path": folder, **SIGNALS[signal]})
    run = kit.run(
        "evaluate",
        tmp_path / "evaluation",
        model=policy,
        prompts=data["prompts"],
        sampling__max_new_tokens=8,
        max_length=64,
        cost=spec,
    )
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    moderator = Moderator.from_pretrained(folder)
    verdicts = moderator([row["prompt"] for row in rows], [row["response"] for row in rows])
    for row, verdict in zip(rows, verdicts):
        logit = {name: math.log(p / (1 - p)) for name, p in verdict.categories.items()}
        unsafe = math.log(verdict.unsafe / (1 - verdict.unsafe))
        expected = {
            "severity": verdict.expected_severity,
            "severity of b": verdict.expected_severity * verdict.categories["b"],
            "logit": unsafe,
            "logit of a, refusal": min(unsafe, logit["a"] - math.log(0.3 / 0.7)) + 2 * verdict.refusal,
        }[signal]
        assert row["cost"] == pytest.approx(expected, abs=1e-4)


def test_a_scorer_that_cannot_be_is_named(tmp_path, capsys):
    folder, _ = saved(tmp_path, "llama")
    policy, data = kit.make_model(tmp_path / "policy"), kit.make_data(tmp_path / "data", n=6)

    def line(cost):
        words = [f"model={policy}", f"prompts={data['prompts']}", f"cost={json.dumps(cost)}", "max_length=64"]
        assert kit.main("evaluate", *words) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    moderator = {"kind": "moderator", "path": folder}
    assert "expected those of the label set toy" in line({**moderator, "categories": ["Violence"]})
    assert "expected a score model, got a moderator" in line(folder)
    assert "expected a moderator" in line({**moderator, "path": policy})
    assert "cost.signal: expected kind moderator" in line({"path": folder, "signal": "unsafe_logit"})
    assert "cost.signal: expected one of" in line({**moderator, "signal": "mood"})
