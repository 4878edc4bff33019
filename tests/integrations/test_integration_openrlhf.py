"""OpenRLHF's functions against ours in their place. Needs OpenRLHF 0.11.2; flash-attn and vLLM, which it
imports, are stubbed.
"""

import inspect

import pytest
import torch
from integration_kit import Batches, gradients, leaf, near, not_worse, pristine, same, snapshot, stub

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed here")


stub("flash_attn", "vllm", without=["flash_attn.ops"])

import openrlhf.models.actor as actor  # noqa: E402
import openrlhf.models.loss as loss  # noqa: E402
import openrlhf.models.utils as utils  # noqa: E402

from saferlhf_fast import integrations  # noqa: E402

pytestmark = pytest.mark.numeric

THEIRS, LOSS = pristine(utils), pristine(loss)


@pytest.fixture
def report():
    with torch.compiler.set_stance("force_eager"), integrations.patch("openrlhf", quiet=True) as made:
        yield made


def test_log_probs_and_entropies_of_random_batches(report):
    for batch in Batches():
        vocabulary, shape = batch.whole(2, 300), (batch.whole(1, 4), batch.whole(1, 7))
        logits = batch.normal(*shape, vocabulary, scale=3).to(batch.pick(torch.float32, torch.bfloat16))
        ids, temperature = batch.ids(vocabulary, *shape), batch.pick(1.0, 0.7, 1.6)
        mine, exact = leaf(logits), leaf(logits.double())
        got = actor.log_probs_from_logits(mine, ids, temperature)
        assert torch.equal(mine, logits)  # theirs divides in place
        expected = THEIRS.log_probs_from_logits(logits.clone(), ids, temperature)
        truth = THEIRS.log_probs_from_logits(exact / temperature, ids)
        near(got, expected, str(batch))
        not_worse(got, expected, truth, str(batch))
        other = leaf(logits)
        entropies = [
            actor.compute_entropy(mine),
            THEIRS.compute_entropy(other),
            THEIRS.compute_entropy(exact),
        ]
        near(*entropies[:2], str(batch))
        not_worse(*entropies, str(batch))
        near(
            gradients([got, entropies[0]], [mine], batch.seed)[0],
            gradients([truth, entropies[2]], [exact], batch.seed)[0],
            str(batch),
        )
    assert report.calls["openrlhf.models.utils:log_probs_from_logits"] == 50


def test_losses_of_random_batches(report):
    for batch in Batches():
        rows, width = batch.whole(1, 5), batch.whole(1, 30)
        mask = batch.holes(batch.rows(rows, width)).to(batch.pick(torch.int64, torch.bool, torch.float32))
        logp, step, third = (
            batch.normal(rows, width),
            batch.normal(rows, width, scale=0.5),
            batch.normal(rows, width),
        )
        counts = batch.pick({}, {"dp_size": 2, "batch_num_tokens": 17.0, "global_batch_size": 6.0})
        policy = {
            "clip_eps_low": 0.2,
            "clip_eps_high": batch.pick(0.2, 0.28),
            "dual_clip": batch.pick(None, 1.5),
            "token_level_loss": batch.pick(True, False),
            "policy_loss_type": batch.pick("ppo", "ppo", "gspo"),
        }
        value = {"clip_eps": batch.pick(None, 0.3), "token_level_loss": batch.pick(True, False)}
        made = []
        for module in (loss, LOSS):
            one, two = leaf(logp), leaf(logp)
            outcome = module.PolicyLoss(**policy)(one, logp + step, third, mask, **counts)
            critic = module.ValueLoss(**value)(two, logp + step, third, mask, **counts)
            made.append([*outcome[:3], critic, *gradients([outcome[0]], [one]), *gradients([critic], [two])])
            assert outcome[3:] == (None, None)
        for number, (one, two) in enumerate(zip(*made)):
            near(one, two, f"{batch} {number}")
    assert report.calls["openrlhf.models.loss:PolicyLoss.forward"] == 50


def test_corrections_are_left_to_theirs(report):
    tensors = torch.randn(4, 2, 5).unbind()
    settings = {"is_correction_level": "token"}
    ours = loss.PolicyLoss(**settings)(*tensors[:3], torch.ones(2, 5), tensors[3])
    theirs = LOSS.PolicyLoss(**settings)(*tensors[:3], torch.ones(2, 5), tensors[3])
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs))


def test_gae_of_random_batches(report):
    maker = pytest.importorskip("openrlhf.trainer.ppo_utils.experience_maker")
    ours = maker.RemoteExperienceMaker.get_advantages_and_returns
    if not hasattr(ours, "__saferlhf_fast__"):
        integrations.patch("openrlhf", quiet=True)
        ours = maker.RemoteExperienceMaker.get_advantages_and_returns
    theirs = pristine(maker).RemoteExperienceMaker.get_advantages_and_returns
    for batch in Batches():
        rows, width = batch.whole(1, 5), batch.whole(1, 40)
        mask = batch.pick(None, batch.holes(batch.rows(rows, width)))
        values, rewards = batch.normal(rows, width), batch.normal(rows, width)
        kept = torch.ones(rows, width, dtype=torch.bool) if mask is None else mask
        for one, two in zip(
            ours(None, values, rewards, mask, 0.99, 0.95), theirs(None, values, rewards, mask, 0.99, 0.95)
        ):
            near(one[kept], two[kept], str(batch))


def test_edge_cases(report):
    logits, ids = torch.randn(1, 3, 7), torch.tensor([[0, 5, 6]])
    logits[0, 1, 2] = -float("inf")
    assert actor.compute_entropy(logits).isfinite().all() and THEIRS.compute_entropy(logits).isnan().any()
    for wrong in (-100, 7):
        with pytest.raises(ValueError, match=f"labels: expected 0 <= id < 7, got {wrong}"):
            actor.log_probs_from_logits(logits, ids.masked_fill(ids == 6, wrong))
    assert actor.log_probs_from_logits(logits[:0], ids[:0]).shape == (0, 3)
    source, nothing = leaf(torch.randn(2, 3)), torch.zeros(2, 3)
    made = loss.PolicyLoss()(source, source.detach(), source.detach(), nothing)
    assert made[0] == 0 and made[2] == 0 and (gradients([made[0]], [source])[0] == 0).all()
    assert LOSS.PolicyLoss()(source, source.detach(), source.detach(), nothing)[0].isnan()
    assert loss.ValueLoss(0.2)(source, source.detach(), source.detach(), nothing) == 0
    gap = torch.tensor([0.0]), torch.tensor([200.0])
    assert loss.LogExpLoss()(*gap) == 200 and LOSS.LogExpLoss()(*gap).isinf()
    near(loss.LogExpLoss()(gap[0], torch.tensor([0.7])), LOSS.LogExpLoss()(gap[0], torch.tensor([0.7])))


def test_compiled_callers_enter_ours():
    logits = torch.randn(2, 7)
    logits[0, 1] = -float("inf")
    with integrations.patch("openrlhf", quiet=True) as made:  # theirs is a torch.compile'd function
        for calls, function in enumerate(
            (lambda x: utils.compute_entropy(x) * 1, utils.compute_entropy), start=1
        ):
            got = torch.compile(function, backend="eager", fullgraph=True)(logits)
            assert got.isfinite().all() and made.calls["openrlhf.models.utils:compute_entropy"] == calls
        assert list(inspect.signature(utils.compute_entropy).parameters) == ["logits"]


def test_a_temperature_that_learns_gets_its_gradient(report):
    ids, made = torch.tensor([[0, 5, 6]]), []
    logits = torch.randn(1, 3, 7)
    for function in (utils.log_probs_from_logits, THEIRS.log_probs_from_logits):
        source, temperature = leaf(logits), torch.tensor(2.0, requires_grad=True)
        made.append(gradients([function(source * 1, ids, temperature)], [source, temperature]))
    for ours, theirs in zip(*made):
        near(ours, theirs)
    one = torch.tensor([2.0])  # not 0-d: theirs broadcasts it
    assert torch.equal(
        *(module.log_probs_from_logits(logits.clone(), ids, one) for module in (utils, THEIRS))
    )


def test_counts_and_arguments_that_are_theirs(report):
    tensors, mask = torch.randn(3, 2, 5).unbind(), torch.ones(2, 5, dtype=torch.bool)
    no_old = [module.ValueLoss(None)(tensors[0], None, tensors[1], mask) for module in (loss, LOSS)]
    assert no_old[0] == no_old[1]
    no_mask = [module.ValueLoss(0.2)(*tensors) for module in (loss, LOSS)]
    assert no_mask[0] == no_mask[1]
    wide = torch.full((5,), 0.2)
    clipped = [module.PolicyLoss(wide, wide)(*tensors, mask)[0] for module in (loss, LOSS)]
    assert clipped[0] == clipped[1]
    for token_level in (True, False):
        for zero in (0.0, torch.tensor(0.0)):
            counts = {"dp_size": 2, "batch_num_tokens": zero, "global_batch_size": zero}
            settings = {"token_level_loss": token_level}
            made = [
                (
                    module.PolicyLoss(**settings)(*tensors, mask, **counts)[0],
                    module.ValueLoss(0.2, **settings)(*tensors, mask, **counts),
                )
                for module in (loss, LOSS)
            ]
            assert torch.equal(torch.stack(made[0]), torch.stack(made[1])) and made[0][1].isinf()
    assert loss.PolicyLoss()(*tensors, mask & False, batch_num_tokens=0.0)[0] == 0  # no token anywhere


def test_every_binding_is_replaced_and_restored():
    before = snapshot(actor, loss, utils)
    with integrations.patch("openrlhf", quiet=True) as report:
        assert (
            actor.log_probs_from_logits
            is utils.log_probs_from_logits
            is not before[utils.__name__, "log_probs_from_logits"]
        )
        assert actor.compute_entropy is utils.compute_entropy
        assert len(report.replaced) >= 5
    same(before, snapshot(actor, loss, utils))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_results_in_the_librarys_own_dtype(kind):
    def results(functions, losses):
        logits, ids = torch.randn(2, 3, 7).to(kind), torch.arange(6).reshape(2, 3)
        logp, mask = torch.randn(2, 3).to(kind), torch.ones(2, 3, dtype=torch.int64)
        made = [
            functions.log_probs_from_logits(logits, ids, 0.7),
            functions.compute_entropy(logits),
            *losses.PolicyLoss()(logp, logp, logp, mask)[:3],
            losses.ValueLoss(0.2)(logp, logp, logp, mask),
        ]
        return [result.dtype for result in made]

    with torch.compiler.set_stance("force_eager"):
        expected = results(THEIRS, LOSS)
        with integrations.patch("openrlhf", quiet=True, dtype="input"):
            assert results(utils, loss) == expected
