"""safe-rlhf's and align-anything's functions: their definitions as formulas, and the libraries themselves
where they import.
"""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from integration_kit import Batches, gradients, leaf, near, not_worse, same, snapshot, stub

from saferlhf_fast import integrations
from saferlhf_fast.integrations import pku

pytestmark = pytest.mark.numeric

CHECKOUTS = {
    "safe_rlhf": (
        "safe_rlhf.utils",
        (
            ("safe_rlhf.trainers.rl_trainer", "RLTrainer"),
            ("safe_rlhf.algorithms.ppo.trainer", "PPOTrainer"),
            ("safe_rlhf.algorithms.ppo_lag.trainer", "PPOLagTrainer"),
        ),
    ),
    "align_anything": (
        "align_anything.utils.tools",
        (("align_anything.trainers.text_to_text.ppo", "PPOTrainer"),),
    ),
}
# What align-anything's modules import at their top and these functions have no use for.
NEEDS = ("librosa", "soundfile", "torchvision", "torchaudio", "gradio", "diffusers", "cv2")


def unused(*_):
    """In the place of the library's function: nothing below may be handed to it."""
    raise AssertionError("handed to the library's own function")


def mean_of_means(x, mask):
    """Their masked_mean."""
    return ((x * mask).sum(-1) / mask.sum(-1)).mean()


def gae_loop(values, rewards, mask, start, gamma, lam):
    """Their GAE, from the last token to `start`."""
    values, rewards, last, made = values * mask, rewards * mask, 0.0, []
    for t in reversed(range(start, rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        made.append(last)
    advantages = torch.stack(made[::-1], 1)
    return advantages, advantages + values[:, start:]


def clipped(logp, old_logp, advantages, mask, clip):
    """Their policy loss."""
    ratio = (logp - old_logp).exp()
    return -mean_of_means(
        torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip)), mask
    )


def critic(values, old_values, returns, mask, clip):
    """Their value loss."""
    near_old = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * mean_of_means(torch.maximum((values - returns) ** 2, (near_old - returns) ** 2), mask)


def _trainer(multiplier=0.7):
    return types.SimpleNamespace(
        gamma=1.0,
        gae_lambda=0.95,
        clip_range_ratio=0.2,
        clip_range_value=0.3,
        log_lambda=torch.nn.Parameter(torch.tensor(multiplier).log()),
    )


def _compare(made, expected, source, other, batch):
    near(made, expected, str(batch))
    near(gradients([made], [source])[0], gradients([expected], [other])[0], str(batch))


def test_formulas_on_random_batches():
    trainer = _trainer()
    for batch in Batches():
        vocabulary, rows, width = batch.whole(2, 200), batch.whole(1, 4), batch.whole(2, 20)
        logits = batch.normal(rows, width, vocabulary, scale=3).to(batch.pick(torch.float32, torch.bfloat16))
        ids = batch.ids(vocabulary, rows, width)
        one, two, three = leaf(logits), leaf(logits), leaf(logits.double())
        made = [
            pku.gather_log_probabilities(unused)(one, ids),
            *(source.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for source in (two, three)),
        ]
        near(*made[:2], str(batch))
        not_worse(*made, str(batch))
        near(
            gradients(made[:1], [one], batch.seed)[0], gradients(made[2:], [three], batch.seed)[0], str(batch)
        )

        start = batch.whole(0, width - 1)
        mask = batch.rows(rows, width, at_least=1)
        mask[:, start] = True
        mask = mask.to(batch.pick(torch.bool, torch.int64))
        tensors = [batch.normal(rows, width) for _ in range(4)]
        kept = mask[:, start:] != 0
        for got, expected in zip(
            pku.get_advantages_and_returns(unused)(trainer, *tensors[:2], mask, start),
            gae_loop(*tensors[:2], mask, start, 1.0, 0.95),
        ):
            near(got[kept], expected[kept], str(batch))
        one, two = leaf(tensors[0]), leaf(tensors[0])
        old = tensors[0] + 0.3 * tensors[1]
        _compare(
            pku.critic_loss_fn(unused)(trainer, one, old, tensors[2], mask),
            critic(two, old, tensors[2], mask, 0.3),
            one,
            two,
            batch,
        )
        _compare(
            pku.actor_loss_fn(unused)(trainer, one, old, tensors[2], mask),
            clipped(two, old, tensors[2], mask, 0.2),
            one,
            two,
            batch,
        )
        combined = (tensors[2] - 0.7 * tensors[3]) / 1.7
        _compare(
            pku.lagrangian_actor_loss_fn(unused)(trainer, one, old, *tensors[2:], mask),
            clipped(two, old, combined, mask, 0.2),
            one,
            two,
            batch,
        )


def test_edge_cases():
    trainer, logits, ids = _trainer(), torch.randn(1, 3, 7), torch.tensor([[0, 5, 6]])
    gather = pku.gather_log_probabilities(unused)
    logits[0, 1, 2] = -float("inf")
    assert gather(logits, ids).isfinite().all()
    for wrong in (-100, 7):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            gather(logits, ids.masked_fill(ids == 6, wrong))
    assert gather(logits[:0], ids[:0]).shape == (0, 3)
    assert gather(logits.bfloat16(), ids).dtype == torch.float32
    mask = torch.tensor([[True, True, False], [False, False, False]])
    source, tensors = leaf(torch.randn(2, 3)), torch.randn(3, 2, 3).unbind()
    losses = (
        pku.critic_loss_fn(unused)(trainer, source, *tensors[:2], mask),
        pku.actor_loss_fn(unused)(trainer, source, *tensors[:2], mask),
        pku.lagrangian_actor_loss_fn(unused)(trainer, source, *tensors, mask),
    )
    # theirs: NaN for the row without a token
    for loss in losses:
        assert loss.isfinite() and gradients([loss], [source])[0].isfinite().all()
    assert critic(source, *tensors[:2], mask, 0.3).isnan()
    far = pku.actor_loss_fn(unused)(trainer, source, source.detach() - 200, torch.full((2, 3), -1.0), mask)
    assert far.isfinite()  # theirs: exp(200) is infinite
    for call in (
        lambda: pku.critic_loss_fn(unused)(trainer, source, tensors[0], leaf(tensors[1]), mask),
        lambda: pku.get_advantages_and_returns(unused)(trainer, source, tensors[0], mask, 0),
    ):
        # theirs lets gradients through to these
        with pytest.raises(AssertionError, match="handed"):
            call()
    weights = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    with pytest.raises(AssertionError, match="handed"):
        pku.actor_loss_fn(unused)(trainer, source, *tensors[:2], weights)


@pytest.mark.parametrize("name", CHECKOUTS)
def test_checkout(name):
    tools, trainers = CHECKOUTS[name]
    if importlib.util.find_spec(name) and name == "align_anything":
        stub(*NEEDS)
    try:
        modules = [importlib.import_module(module) for module in (tools, *(module for module, _ in trainers))]
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported here: {error}")
    before = snapshot(*modules)
    held = {key[-1]: value for key, value in before.items()}
    batch = next(iter(Batches()))
    logits, ids, mask = batch.normal(2, 9, 30), batch.ids(30, 2, 9), batch.rows(2, 9)
    mask[:, 3] = True
    tensors, trainer = [batch.normal(2, 9, scale=0.3) for _ in range(4)], _trainer()
    tail = [tensor[:, 3:] for tensor in tensors]

    def calls(owner):
        return {
            "gae": owner["get_advantages_and_returns"](trainer, *tensors[:2], mask, 3)[0][mask[:, 3:]],
            "critic": owner["critic_loss_fn"](trainer, *tail[:3], mask[:, 3:]),
            "gather": owner["gather_log_probabilities"](logits, ids),
        }

    expected = calls(held)
    with integrations.patch(name, quiet=True) as report:
        ours = {key[-1]: value for key, value in snapshot(*modules).items()}
        for key, value in calls(ours).items():
            near(value, expected[key], key)
        assert (
            sum(report.calls.values()) == 3
            and ours["gather_log_probabilities"] is not held["gather_log_probabilities"]
        )
        assert vars(modules[-1])["gather_log_probabilities"] is ours["gather_log_probabilities"]
        if name == "safe_rlhf":
            lag = modules[-1].PPOLagTrainer
            near(
                lag.actor_loss_fn(trainer, *tail, mask[:, 3:]),
                before[modules[-1].__name__, "PPOLagTrainer", "actor_loss_fn"](trainer, *tail, mask[:, 3:]),
            )
    same(before, snapshot(*modules))


def test_a_ppo_lag_step_of_safe_rlhf_has_the_same_numbers():
    if not importlib.util.find_spec("safe_rlhf") or not importlib.util.find_spec("optree"):
        pytest.skip("safe_rlhf, or optree, which it needs, is not installed here")
    worker = Path(__file__).parents[1] / "support" / "safe_rlhf_worker.py"
    theirs, ours = (
        json.loads(
            subprocess.run(
                [sys.executable, worker, *words], check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
        )
        for words in ((), ("patched",))
    )
    assert (
        len(ours["steps"]) == len(theirs["steps"]) == 4
        and ours["steps"][0].keys() == theirs["steps"][0].keys()
    )
    for one, two in zip(ours["steps"], theirs["steps"]):
        assert one == pytest.approx(two, rel=2e-4, abs=2e-5)
    assert len({step["train/lambda"] for step in theirs["steps"]}) > 1
    calls = {name.rpartition(":")[2]: count for name, count in ours["calls"].items()}
    assert calls["PPOLagTrainer.actor_loss_fn"] == 4 and calls["RLTrainer.critic_loss_fn"] == 8
    assert calls["RLTrainer.get_advantages_and_returns"] == 8 and calls["gather_log_probabilities"] >= 12
