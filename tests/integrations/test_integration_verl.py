"""verl's functions against ours in their place: values, gradients, metrics, edge cases, registries. Needs
verl 0.9.1.
"""

import os
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed here")
import verl.trainer.ppo.core_algos as core  # noqa: E402
import verl.utils.experimental.torch_functional as fused  # noqa: E402
import verl.utils.torch_functional as functional  # noqa: E402
from integration_kit import Batches, gradients, leaf, near, not_worse, pristine, same, snapshot  # noqa: E402

from saferlhf_fast import integrations  # noqa: E402

pytestmark = pytest.mark.numeric

THEIRS, CORE, FUSED = pristine(functional), pristine(core), pristine(fused)
CORE.verl_F = THEIRS
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


@pytest.fixture
def report():
    with integrations.patch("verl", quiet=True) as made:
        yield made


def test_log_probs_and_entropies_of_random_batches(report):
    for batch in Batches():
        vocabulary = batch.whole(2, 300)
        shape = batch.pick((batch.whole(1, 12),), (batch.whole(1, 4), batch.whole(1, 7)))
        logits = batch.normal(*shape, vocabulary, scale=3).to(
            batch.pick(torch.float32, torch.bfloat16, torch.float64)
        )
        # a stride of 2
        logits = logits if batch.seed % 3 else logits.repeat_interleave(2, -1)[..., ::2]
        ids = batch.ids(vocabulary, *shape)
        mine, other, exact = leaf(logits), leaf(logits), leaf(logits.double())
        pairs = [
            (
                functional.logprobs_from_logits(mine, ids),
                THEIRS.logprobs_from_logits(other, ids),
                THEIRS.logprobs_from_logits(exact, ids),
            ),
            (
                functional.entropy_from_logits(mine),
                THEIRS.entropy_from_logits(other),
                THEIRS.entropy_from_logits(exact),
            ),
        ]
        for got, expected, truth in pairs:
            near(got, expected, str(batch))
            not_worse(got, expected, truth, str(batch))
        made = [
            gradients([pair[k] for pair in pairs], [source], batch.seed)[0]
            for k, source in enumerate((mine, other, exact))
        ]
        near(*made[:2], str(batch))
        not_worse(*made, str(batch))
        if len(shape) == 1 and logits.dtype != torch.float64:
            near(
                functional.entropy_from_logits_with_chunking(mine, 3),
                THEIRS.entropy_from_logits_with_chunking(other, 3),
            )
    assert report.calls["verl.utils.torch_functional:logprobs_from_logits"] == 50


def test_fused_linear_of_random_batches(report):
    for batch in Batches():
        width, vocabulary = batch.whole(1, 24), batch.whole(2, 200)
        shape = batch.pick((batch.whole(1, 20),), (batch.whole(1, 4), batch.whole(1, 7)))
        kind = batch.pick(torch.float32, torch.float32, torch.bfloat16)
        sources = [batch.normal(*shape, width, dtype=kind), batch.normal(vocabulary, width, dtype=kind)]
        ids = batch.ids(vocabulary, *shape).to(batch.pick(torch.int64, torch.int32))
        temperature, made = batch.pick(1.0, 0.7, 1.6), []
        for module in (fused, FUSED):
            mine = [leaf(source) for source in sources]
            outputs = module.FusedLinearForPPO(chunk_size=5).forward(*mine, ids, temperature)
            made.append((outputs, gradients(outputs, mine, batch.seed)))
        exact = [leaf(source.double()) for source in sources]
        log_p = (exact[0] @ exact[1].t() / temperature).log_softmax(-1)
        truth = log_p.gather(-1, ids.long()[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
        truth = [*truth, *gradients(truth, exact, batch.seed)]
        (ours, our_gradients), (theirs, their_gradients) = made
        for one, two, three in zip((*ours, *our_gradients), (*theirs, *their_gradients), truth):
            near(one.to(kind), two, str(batch))
            not_worse(one, two, three, str(batch))


def test_gae_and_whitening_of_random_batches(report):
    for batch in Batches():
        rows, width = batch.whole(1, 5), batch.whole(2, 40)
        mask = batch.holes(batch.rows(rows, width, at_least=2)).to(
            batch.pick(torch.int64, torch.bool, torch.float32)
        )
        if mask.sum() < 2:
            continue
        rewards, values = batch.normal(rows, width), batch.normal(rows, width)
        gamma, lam = batch.pick(1.0, 0.99), batch.pick(0.95, 1.0, 0.0)
        kept = mask != 0
        for got, expected in zip(
            core.compute_gae_advantage_return(rewards, values, mask, gamma, lam),
            CORE.compute_gae_advantage_return(rewards, values, mask.long(), gamma, lam),
        ):
            near(got[kept], expected[kept], str(batch))
            assert (got[~kept] == 0).all()
        for shift in (True, False):
            one, two = leaf(values), leaf(values)
            got, expected = functional.masked_whiten(one, mask, shift), THEIRS.masked_whiten(two, mask, shift)
            near(got, expected, str(batch))
            near(
                *(
                    gradients([made], [source], batch.seed)[0]
                    for made, source in ((got, one), (expected, two))
                ),
                str(batch),
            )


def _config(batch, **info):
    values = {
        "clip_ratio": 0.2,
        "clip_ratio_low": batch.pick(None, 0.1),
        "clip_ratio_high": batch.pick(None, 0.28),
        "clip_ratio_c": batch.pick(3.0, 1.3),
        "global_batch_info": info,
    }
    config = types.SimpleNamespace(**values)
    config.get = lambda name, default=None: values.get(name, default)
    return config


def test_policy_and_value_loss_of_random_batches(report):
    for batch in Batches():
        rows, width = batch.whole(1, 5), batch.whole(1, 30)
        mask = batch.holes(batch.rows(rows, width, at_least=0))
        if not mask.any():
            continue
        mask = mask.to(batch.pick(torch.int64, torch.bool, torch.float32))
        logp, step, advantages = (
            batch.normal(rows, width),
            batch.normal(rows, width, scale=0.5),
            batch.normal(rows, width),
        )
        mode = batch.pick(*MODES)
        info = batch.pick(
            {}, {"dp_size": 2, "batch_num_tokens": 17, "global_batch_size": 6, "loss_scale_factor": 9}
        )
        weights = batch.pick(
            None, batch.normal(rows, width).clamp(min=0), torch.zeros(rows, 1), torch.ones(rows, width)
        )
        made = []
        for module in (core, CORE):
            source = leaf(logp)
            loss, metrics = module.get_policy_loss_fn("vanilla")(
                logp + step,
                source,
                advantages,
                mask,
                mode,
                _config(batch.__class__(batch.seed), **info),
                weights,
            )
            made.append((loss, gradients([loss], [source])[0], metrics))
        near(made[0][0], made[1][0], f"{batch} {mode}")
        near(made[0][1], made[1][1], f"{batch} {mode}")
        assert made[0][2] == pytest.approx(made[1][2], abs=1e-5) and made[0][2].keys() == made[1][2].keys()
        made = []
        for module in (core, CORE):
            source = leaf(logp)
            loss, share = module.compute_value_loss(source, logp + step, advantages, mask, 0.3, mode, **info)
            made.append((loss, gradients([loss], [source])[0], share))
        for one, two in zip(*made):
            near(one, two, f"{batch} {mode}")
    assert report.calls["verl.trainer.ppo.core_algos:compute_policy_loss_vanilla"] > 40


def test_weights_of_zero_hide_no_clip(report):
    logp, old = torch.zeros(2, 3), torch.tensor([[1.0, -1.0, 0.0], [-2.0, 1.0, 0.0]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    for weights in (torch.zeros(2, 3), torch.tensor([[0.0] * 3, [1.0] * 3])):
        arguments = (
            old,
            logp,
            advantages,
            torch.ones(2, 3),
            "token-mean",
            _config(next(iter(Batches()))),
            weights,
        )
        ours, theirs = (module.compute_policy_loss_vanilla(*arguments) for module in (core, CORE))
        near(ours[0], theirs[0])
        assert ours[1] == pytest.approx(theirs[1], abs=1e-6) and ours[1]["actor/pg_clipfrac"] > 0
    assert report.calls["verl.trainer.ppo.core_algos:compute_policy_loss_vanilla"] == 2


@pytest.mark.parametrize(
    ("mode", "counts"),
    [
        ("token-mean", {"batch_num_tokens": 0}),
        ("token-mean", {"batch_num_tokens": torch.tensor(0)}),
        ("token-mean", {"batch_num_tokens": -3}),
        ("seq-mean-token-sum", {"global_batch_size": 0}),
        ("seq-mean-token-mean", {"global_batch_size": 0}),
        ("token-sum", {"dp_size": 0}),
        ("seq-mean-token-sum-norm", {"global_batch_size": 2, "loss_scale_factor": 0}),
    ],
)
def test_global_counts_of_zero_are_theirs_where_there_are_tokens(report, mode, counts):
    tensors, mask = torch.randn(3, 2, 5).unbind(), torch.ones(2, 5)
    for tokens in (mask, torch.tensor([[1.0] * 5, [0.0] * 5])):
        config = _config(next(iter(Batches())), **counts)
        policy = [
            module.compute_policy_loss_vanilla(*tensors, tokens, mode, config)[0] for module in (core, CORE)
        ]
        value = [
            module.compute_value_loss(*tensors, tokens, 0.3, mode, **counts)[0] for module in (core, CORE)
        ]
        assert torch.equal(*policy) and torch.equal(*value)
    assert core.compute_value_loss(*tensors, mask * 0, 0.3, mode, **counts)[0].nan_to_num() == 0


def test_tensors_in_the_place_of_numbers_are_theirs(report):
    tensors, mask = torch.randn(3, 2, 5).unbind(), torch.ones(2, 5)
    wide = torch.full((5,), 0.3)
    for one, two in zip(*(module.compute_value_loss(*tensors, mask, wide) for module in (core, CORE))):
        assert torch.equal(one, two)
    made = []
    for module in (core, CORE):
        config = _config(next(iter(Batches())))
        config.clip_ratio_low = config.clip_ratio_high = wide
        made.append(module.compute_policy_loss_vanilla(*tensors, mask, "token-mean", config)[0])
    assert torch.equal(*made)
    for gamma in (torch.tensor([1.0, 0.5]), 1.5):  # what our gae refuses, too
        for one, two in zip(
            *(module.compute_gae_advantage_return(*tensors[:2], mask, gamma, 0.9) for module in (core, CORE))
        ):
            near(one, two)
    hidden, weight, ids = torch.randn(4, 8), torch.randn(4, 8), torch.arange(4)
    by_word = torch.tensor([1.0, 2.0, 3.0, 4.0])  # theirs divides the columns by it
    for one, two in zip(
        *(module.FusedLinearForPPO().forward(hidden, weight, ids, by_word) for module in (fused, FUSED))
    ):
        assert torch.equal(one, two)


def test_config_of_their_own(report):
    config = pytest.importorskip("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True
    )
    tensors = torch.randn(3, 2, 5).unbind()
    mask = torch.ones(2, 5)
    ours = core.POLICY_LOSS_REGISTRY["vanilla"](*tensors, mask, "token-mean", config)
    theirs = CORE.POLICY_LOSS_REGISTRY["vanilla"](*tensors, mask, "token-mean", config)
    near(ours[0], theirs[0])
    assert ours[1] == pytest.approx(theirs[1], abs=1e-6)


def test_edge_cases(report):
    logits, ids = torch.randn(3, 7), torch.tensor([0, 5, 6])
    logits[1, 2] = -float("inf")
    for function in ("entropy_from_logits", "entropy_from_logits_with_chunking"):
        assert (
            getattr(functional, function)(logits).isfinite().all()
            and getattr(THEIRS, function)(logits).isnan().any()
        )
    for wrong in (-100, 7):
        with pytest.raises(ValueError, match=f"labels: expected 0 <= id < 7, got {wrong}"):
            functional.logprobs_from_logits(logits, ids.masked_fill(ids == 6, wrong))
    assert functional.logprobs_from_logits(logits[:0], ids[:0]).shape == (0,)
    with pytest.raises(RuntimeError):
        THEIRS.logprobs_from_logits(logits[:0], ids[:0])
    with pytest.raises(ValueError, match="at least two"):
        functional.masked_whiten(torch.randn(2, 3), torch.zeros(2, 3))
    values, nothing = leaf(torch.randn(2, 3)), torch.zeros(2, 3)
    loss, metrics = core.compute_policy_loss_vanilla(
        values.detach(), values, values.detach(), nothing, "token-mean", _config(next(iter(Batches())))
    )
    assert loss == 0 and (gradients([loss], [values])[0] == 0).all() and set(metrics.values()) == {0.0}
    poisoned = torch.tensor([[0.3, float("nan"), 0.1]])
    made = core.compute_gae_advantage_return(poisoned, poisoned, torch.tensor([[1, 0, 1]]), 1.0, 0.95)
    assert all(part.isfinite().all() for part in made)
    weighted = torch.tensor([[1.0, 0.5, 1.0]])  # no flags: theirs, whatever that means
    tensors = torch.randn(3, 1, 3).unbind()
    config = _config(next(iter(Batches())))
    assert (
        core.compute_policy_loss_vanilla(*tensors, weighted, "token-mean", config)[0]
        == CORE.compute_policy_loss_vanilla(*tensors, weighted, "token-mean", config)[0]
    )
    flags, negative = torch.ones(1, 3), torch.tensor([[1.0, -1.0, 2.0]])
    for arguments in (
        (*tensors, flags, "token-mean", config, negative),
        (tensors[0], tensors[1], leaf(tensors[2]), flags, "token-mean", config),
    ):
        got, expected = (module.compute_policy_loss_vanilla(*arguments)[0] for module in (core, CORE))
        assert got == expected and got.requires_grad == expected.requires_grad
    whole = torch.ones(1, 3, dtype=torch.int64)
    assert torch.equal(
        core.compute_gae_advantage_return(whole, tensors[0], flags, 1.0, 0.9)[1],
        CORE.compute_gae_advantage_return(whole, tensors[0], flags, 1.0, 0.9)[1],
    )
    with pytest.raises(ValueError, match="required when dp_size > 1"):
        core.compute_value_loss(*tensors, weighted, 0.2, dp_size=2)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
        core.compute_value_loss(*tensors, weighted, 0.2, "sum")


def test_compiled_entropy_is_ours_and_counted(report):
    compiled = torch.compile(functional.entropy_from_logits, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 8):
        logits, other = (leaf(torch.randn(rows, 11)) for _ in range(2))
        other.data.copy_(logits.data)
        near(compiled(logits), THEIRS.entropy_from_logits(other))
        near(
            *(
                gradients([made], [source])[0]
                for made, source in ((compiled(logits), logits), (THEIRS.entropy_from_logits(other), other))
            )
        )
    assert 1 <= report.calls["verl.utils.torch_functional:entropy_from_logits"] < 6


def test_registries_and_bindings_are_replaced_and_restored():
    import verl.workers.engine.fsdp.transformer_impl as engine
    import verl.workers.utils.losses as losses

    before = snapshot(core, functional, fused, engine, losses)
    held = core.compute_policy_loss_vanilla
    with integrations.patch("verl", quiet=True) as report:
        assert core.POLICY_LOSS_REGISTRY["vanilla"] is core.compute_policy_loss_vanilla is not held
        assert core.get_adv_estimator_fn("gae") is core.compute_gae_advantage_return
        assert engine.logprobs_from_logits is functional.logprobs_from_logits
        assert losses.compute_value_loss is core.compute_value_loss
        assert "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY['vanilla']" in str(report)
        with integrations.patch("verl", quiet=True):
            # a second context ends; the first one's work stays
            pass
        assert core.POLICY_LOSS_REGISTRY["vanilla"] is not held
    same(before, snapshot(core, functional, fused, engine, losses))


def test_the_environment_patches_every_process_that_imports_verl():
    code = """if True:
        import verl
        from saferlhf_fast import integrations
        import verl.trainer.ppo.core_algos as core, verl.workers.engine.fsdp.transformer_impl as engine
        assert integrations.patched() == ["verl"]
        assert core.POLICY_LOSS_REGISTRY["vanilla"].__saferlhf_fast__
        assert engine.logprobs_from_logits.__saferlhf_fast__
    """
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "VERL_USE_EXTERNAL_MODULES": "saferlhf_fast.integrations.verl_worker"},
    )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_results_in_the_librarys_own_dtype(kind):
    def results(of, functions):
        logits, ids = torch.randn(2, 3, 7).to(kind), torch.arange(6).reshape(2, 3)
        logp, mask = torch.randn(2, 3).to(kind), torch.ones(2, 3, dtype=torch.int64)
        loss, _ = of.compute_policy_loss_vanilla(
            logp, logp, logp, mask, config=_config(next(iter(Batches(1))))
        )
        return [
            functions.logprobs_from_logits(logits, ids),
            functions.entropy_from_logits(logits),
            functions.entropy_from_logits_with_chunking(logits[0]),
            functions.masked_whiten(logp, mask.float()),
            *of.compute_gae_advantage_return(logp, logp, mask, 0.9, 0.9),
            *of.compute_value_loss(logp, logp, logp, mask, 0.2),
            loss,
        ]

    expected = [result.dtype for result in results(CORE, THEIRS)]
    with integrations.patch("verl", quiet=True, dtype="input"):
        assert [result.dtype for result in results(core, functional)] == expected
        # its own fused head has no such transform
        made = torch.vmap(lambda h, i: fused.FusedLinearForPPO()(h, torch.ones(7, 5), i))(
            torch.randn(2, 1, 3, 5), torch.zeros(2, 1, 3, dtype=torch.int64)
        )
        assert made[0].shape == (2, 1, 3) and torch.allclose(made[1], torch.tensor(7.0).log().expand(2, 1, 3))
