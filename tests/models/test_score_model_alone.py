"""ScoreModel in somebody's own code: from the package's top, made in each of its ways, against transformers'
own class.
"""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from kit import make_model, make_tokenizer  # noqa: E402

from saferlhf_fast import ScoreModel, load_score_model, save_score_model, score_model_from_backbone  # noqa: E402


@pytest.fixture
def batch():
    ids = torch.randint(4, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1] * 7])
    return ids, mask


@pytest.mark.numeric
def test_it_scores_as_transformers_own_class_does(tmp_path, batch):
    from transformers import AutoModelForSequenceClassification

    base, (ids, mask) = make_model(tmp_path / "lm"), batch
    model = score_model_from_backbone(base)
    save_score_model(str(tmp_path / "score"), model, make_tokenizer(), kind="reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "score", num_labels=1).eval()
    mine = load_score_model(str(tmp_path / "score")).eval()
    # theirs looks for the padding token: one row at a time, without any
    for row in range(3):
        kept = ids[row][mask[row].bool()][None]
        score = mine.end_scores(mine(kept, torch.ones_like(kept)), torch.ones_like(kept))
        torch.testing.assert_close(score[0], theirs(kept).logits[0, 0])
    padded = mine.end_scores(mine(ids, mask), mask)
    torch.testing.assert_close(padded[0], theirs(ids[0:1, :3]).logits[0, 0])
    torch.testing.assert_close(padded[1], theirs(ids[1:2, 2:]).logits[0, 0])
    assert mine.kind == "reward" and padded.dtype == torch.float32


@pytest.mark.numeric
def test_around_any_transformers_body_and_trained_by_a_plain_loop(tmp_path, batch):
    from transformers import AutoModel

    ids, mask = batch
    torch.manual_seed(0)
    model = ScoreModel(AutoModel.from_pretrained(make_model(tmp_path / "lm")), kind="cost")
    optimizer, wanted = torch.optim.Adam(model.parameters(), lr=1e-2), torch.tensor([1.0, -1.0, 0.5])
    losses = []
    for _ in range(20):
        loss = (model.end_scores(model(ids, mask), mask) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]  # at most 0.0074 over 5 seeds


def test_a_language_model_is_no_score_model(tmp_path):
    with pytest.raises(ValueError, match="score"):
        load_score_model(make_model(tmp_path / "lm"))


# ---------------------------------------------------------------- what does not fit, and the edges


@pytest.fixture(scope="module")
def tiny():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    return ScoreModel(
        LlamaModel(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
            )
        )
    ).eval()


@pytest.mark.numeric
def test_without_a_mask_every_token_is_real(tiny, batch):
    ids, _ = batch
    expected = tiny(ids, torch.ones_like(ids))
    assert torch.equal(tiny(ids), expected) and torch.equal(tiny(ids.short()), expected)
    assert torch.equal(tiny(ids, torch.ones(3, 7)), expected)
    assert torch.equal(tiny(ids, position_ids=torch.arange(7)[None]), expected)


@pytest.mark.parametrize(("rows", "columns"), [(0, 7), (3, 0), (0, 0)])
def test_an_empty_batch_has_an_empty_answer(tiny, rows, columns):
    ids = torch.zeros(rows, columns, dtype=torch.long)
    scores = tiny(ids, torch.ones_like(ids))
    assert scores.shape == (rows, columns) and scores.dtype == torch.float32
    if not rows:
        ends = tiny.end_scores(scores, torch.ones_like(ids))
        assert ends.shape == (0,)
        ends.sum().backward()  # a rank without rows steps with the others
        assert all(p.grad is not None and not p.grad.any() for p in tiny.parameters())
        tiny.zero_grad()


@pytest.mark.numeric
def test_scores_are_fp32_under_autocast(tiny, batch):
    with torch.no_grad():
        hidden = tiny.backbone(input_ids=batch[0]).last_hidden_state
        expected = tiny.score(hidden)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tiny.score(hidden), expected)
            assert tiny(*batch).dtype == torch.float32
    # a device without autocast
    assert copy.deepcopy(tiny.score).to("meta")(hidden.to("meta")).is_meta


def test_a_row_without_a_token_has_no_score(batch):
    scores, mask = torch.arange(6.0).view(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="expected a real token in each row, got none in row 1"):
        ScoreModel.end_scores(scores, mask)
    # as on a GPU
    unseen = torch.compile(ScoreModel.end_scores, backend="eager", fullgraph=True)(scores, mask)
    assert unseen[0] == 1.0 and unseen[1].isnan()


@pytest.mark.numeric
def test_both_steps_compile_to_one_graph(tiny, batch):
    def ends(ids, mask):
        return tiny.end_scores(tiny(ids, mask), mask)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ends, backend="eager", fullgraph=True)(*batch), ends(*batch))


IDS, MASK = (
    torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(1)),
    torch.ones(2, 6, dtype=torch.long),
)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IDS, MASK * 0.5), "attention_mask: expected booleans or numbers 0 and 1, got 0.5"),
        (
            (IDS, torch.zeros(2, 6)),
            "attention_mask: expected a 1 at each real token .* got torch.float32 and a row of zeros",
        ),
        ((IDS, torch.zeros(2, 6).index_fill(1, torch.tensor(0), float("-inf"))), "numbers 0 and 1, got -inf"),
        ((IDS, MASK * 1j), "got torch.complex64"),
        ((IDS, torch.zeros(2, 1, 6, 6)), r"got torch.float32 \[2, 1, 6, 6\]"),
        ((IDS, MASK + torch.arange(6) % 2), "attention_mask: expected booleans or numbers 0 and 1, got 2"),
        ((IDS, -MASK), "attention_mask: .* got -1"),
        ((IDS, MASK[:1]), r"attention_mask: expected .* \[2, 6\] on cpu, got torch.int64 \[1, 6\]"),
        ((IDS, MASK[:, :4]), r"got torch.int64 \[2, 4\]"),
        ((IDS, MASK.to("meta")), r"got torch.int64 \[2, 6\] on meta"),
        ((IDS.to("meta"), MASK), "ids: expected a device with values, as the model's cpu, got meta"),
        (
            (IDS.to("meta"), MASK.to("meta")),
            "ids: expected a device with values, as the model's cpu, got meta",
        ),
        ((IDS.float(), MASK), r"ids: expected integers \[B, L\], got torch.float32 \[2, 6\]"),
        ((IDS[0], MASK[0]), r"ids: expected integers \[B, L\], got torch.int64 \[6\]"),
        ((IDS + 100, MASK), "ids: expected 0 <= id < 32, got 1"),
        ((IDS - 100, MASK), "ids: expected 0 <= id < 32, got -"),
        (
            (IDS, MASK, MASK[:, :1]),
            r"position_ids: expected integers \[2, 6\] on cpu, got torch.int64 \[2, 1\]",
        ),
        ((IDS, MASK, MASK.float()), "position_ids: .* got torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny, inputs, message):
    with pytest.raises(ValueError, match=f"^ScoreModel: .*{message}") as caught:
        tiny(*inputs)
    assert "\n" not in str(caught.value)


def test_a_packed_comes_alone(tiny):
    from saferlhf_fast.models.packing import pack_sequences

    packed = pack_sequences([[1, 2, 3]], [range(3)], torch.device("cpu"))
    assert tiny(packed).shape == (3,)
    with pytest.raises(ValueError, match="expected a Packed alone, got a mask or position ids"):
        tiny(packed, torch.ones(1, 3))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (torch.zeros(2, 6), MASK[:1]),
            r"attention_mask: expected .* \[2, 6\] on cpu, got torch.int64 \[1, 6\]",
        ),
        ((torch.zeros(2, 6), MASK[:, :4]), r"got torch.int64 \[2, 4\]"),
        ((torch.zeros(2, 6), MASK * 0.5), "numbers 0 and 1, got 0.5"),
        ((torch.zeros(2, 6), MASK * 0.0), "got torch.float32 and a row of zeros"),
        ((torch.zeros(2, 6), MASK * 2), "expected booleans or numbers 0 and 1, got 2"),
        ((torch.zeros(2, 6), None), r"expected a mask \[B, L\], got None"),
        (
            (torch.zeros(2, 6, 2), MASK),
            r"scores: expected floating point \[B, L\], got torch.float32 \[2, 6, 2\]",
        ),
        ((MASK, MASK), "scores: expected floating point .* got torch.int64"),
        ((torch.zeros(2, 0), MASK[:, :0]), "expected a real token in each row, got none in row 0"),
    ],
)
def test_end_scores_refuses_what_does_not_fit(inputs, message):
    with pytest.raises(ValueError, match=f"^end_scores: .*{message}"):
        ScoreModel.end_scores(*inputs)
