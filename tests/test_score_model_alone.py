"""ScoreModel in somebody's own code: from the package's top, made in each of its ways, against transformers' own class."""

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


def test_it_scores_as_transformers_own_class_does(tmp_path, batch):
    from transformers import AutoModelForSequenceClassification
    base, (ids, mask) = make_model(tmp_path / "lm"), batch
    model = score_model_from_backbone(base)
    save_score_model(str(tmp_path / "score"), model, make_tokenizer(), kind="reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "score", num_labels=1).eval()
    mine = load_score_model(str(tmp_path / "score")).eval()
    for row in range(3):                                 # theirs looks for the padding token: one row at a time, without any
        kept = ids[row][mask[row].bool()][None]
        score = mine.end_scores(mine(kept, torch.ones_like(kept)), torch.ones_like(kept))
        torch.testing.assert_close(score[0], theirs(kept).logits[0, 0])
    padded = mine.end_scores(mine(ids, mask), mask)
    torch.testing.assert_close(padded[0], theirs(ids[0:1, :3]).logits[0, 0])
    torch.testing.assert_close(padded[1], theirs(ids[1:2, 2:]).logits[0, 0])
    assert mine.kind == "reward" and padded.dtype == torch.float32


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
    assert losses[-1] < 0.1 * losses[0]


def test_a_language_model_is_no_score_model(tmp_path):
    with pytest.raises(ValueError, match="score"):
        load_score_model(make_model(tmp_path / "lm"))
