"""TRL's functions against ours in their place: values, gradients, edge cases, every binding. In an
environment with TRL 1.16.
"""

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed here")
import trl.trainer.utils as utils  # noqa: E402
from integration_kit import Batches, gradients, leaf, near, not_worse, pristine, same, snapshot  # noqa: E402

from saferlhf_fast import integrations  # noqa: E402

pytestmark = pytest.mark.numeric

THEIRS = pristine(utils)
HELD = {"log_softmax": utils.selective_log_softmax, "head": utils._ChunkedLogProbFunction}
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
KINDS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.fixture
def report():
    with integrations.patch("trl", quiet=True) as made:
        yield made


def _logits(batch):
    vocabulary = batch.whole(2, 300)
    shape = batch.pick((batch.whole(1, 9),), (batch.whole(1, 4), batch.whole(1, 7)))
    if batch.seed % 3 == 0:
        return (
            batch.normal(*reversed(shape), vocabulary, scale=3)
            .transpose(0, len(shape) - 1)
            .to(batch.pick(*KINDS))
        )
    return batch.normal(*shape, vocabulary, scale=3).to(batch.pick(*KINDS))


def test_log_probs_and_entropies_of_random_batches(report):
    for batch in Batches():
        logits = _logits(batch)
        ids = batch.ids(logits.shape[-1], *logits.shape[:-1]).to(
            batch.pick(torch.int64, torch.int64, torch.int32)
        )
        wide = ids.long()  # theirs gathers with int64 alone
        temperature = batch.pick(1.0, 0.7, 1.3)
        row_mask = batch.pick(None, batch.ids(2, *ids.shape), batch.ids(2, *ids.shape).bool())
        mine, other, exact = leaf(logits), leaf(logits), leaf(logits.double())
        options = {"temperature": temperature, "row_mask": row_mask}
        got = utils.selective_log_softmax_and_entropy(mine, ids, **options)
        expected = THEIRS.selective_log_softmax_and_entropy(other, wide, **options)
        truth = THEIRS.selective_log_softmax_and_entropy(exact, wide, **options)
        for one, two, three in zip(got, expected, truth):
            near(one, two, str(batch))
            not_worse(one, two, three, str(batch))
        made = [
            gradients(outputs, [source], batch.seed)[0]
            for outputs, source in ((got, mine), (expected, other), (truth, exact))
        ]
        near(*made[:2], str(batch))
        not_worse(*made, str(batch))
        near(utils.selective_log_softmax(mine, ids, **options), expected[0], str(batch))
        near(utils.entropy_from_logits(mine), THEIRS.entropy_from_logits(other), str(batch))
        detached = utils.selective_log_softmax_and_entropy(mine, ids, entropy_requires_grad=False)[1]
        assert not detached.requires_grad
    assert report.calls["trl.trainer.utils:selective_log_softmax_and_entropy"] == 100


def test_k_indices_a_position_are_left_to_theirs(report):
    logits, ids = torch.randn(2, 3, 11), torch.randint(11, (2, 3, 4))
    assert torch.equal(utils.selective_log_softmax(logits, ids), THEIRS.selective_log_softmax(logits, ids))
    one_row = ids[:1, :, 0]  # theirs broadcasts
    assert torch.equal(
        utils.selective_log_softmax(logits, one_row), THEIRS.selective_log_softmax(logits, one_row)
    )


def _exact(hidden, weight, bias, ids, temperature, softcap, scale):
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def test_chunked_head_of_random_batches(report):
    for batch in Batches():
        count, width, vocabulary = batch.whole(1, 40), batch.whole(1, 24), batch.whole(2, 200)
        kind = batch.pick(torch.float32, torch.float32, torch.bfloat16)
        sources = [batch.normal(count, width, dtype=kind), batch.normal(vocabulary, width, dtype=kind)]
        sources += [batch.normal(vocabulary, dtype=kind)] if batch.pick(True, False) else []
        ids = batch.ids(vocabulary, count)
        temperature, softcap, scale = (
            batch.pick(1.0, 0.6, 1.7),
            batch.pick(None, None, 4.0),
            batch.pick(1.0, 1.0, 0.25, 3.0),
        )
        outputs = batch.pick((), ("entropy",), ("entropy", "mean_logits", "is_top1"), ALL)
        made = {}
        for name, function in (
            ("ours", utils._ChunkedLogProbFunction),
            ("theirs", THEIRS._ChunkedLogProbFunction),
        ):
            mine = [leaf(source) for source in sources]
            bias = mine[2] if len(mine) == 3 else None
            results = function.apply(mine[0], mine[1], bias, ids, temperature, 32768, softcap, scale, outputs)
            made[name] = results, gradients(results[:2], mine, batch.seed)
        exact = [leaf(source.double()) for source in sources]
        truth = _exact(*exact[:2], exact[2] if len(exact) == 3 else None, ids, temperature, softcap, scale)
        # two bf16 logits may tie that float32 tells apart
        near_ties = kind == torch.bfloat16
        for name, one, two in zip(("logp", *ALL), made["ours"][0], made["theirs"][0]):
            assert (one is None) == (two is None), f"{batch}: {name}"
            if one is None or (name == "is_top1" and near_ties):
                continue
            assert one.dtype == two.dtype
            near(one.bfloat16() if near_ties else one, two, f"{batch}: {name}")
        for one, two, three in zip(made["ours"][0], made["theirs"][0], truth):
            if one is not None:
                not_worse(one, two, three, str(batch))
        with torch.no_grad():
            quiet = utils._ChunkedLogProbFunction.apply(
                *sources[:2],
                sources[2] if len(sources) == 3 else None,
                ids,
                temperature,
                32768,
                softcap,
                scale,
                outputs,
            )
        for one, two in zip(quiet, made["ours"][0]):
            assert (one is None and two is None) or torch.equal(one, two), str(batch)
        truth = truth if "entropy" in outputs else truth[:1]
        for one, two, three in zip(made["ours"][1], made["theirs"][1], gradients(truth, exact, batch.seed)):
            assert one.dtype == two.dtype
            near(one, two, str(batch))
            not_worse(one, two, three, str(batch))
    assert report.calls["trl.trainer.utils:_ChunkedLogProbFunction"] == 100


def test_head_has_first_derivatives_alone(report):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    logp, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight, None, torch.arange(6), 1.0, 32768)
    (gradient,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        gradient.square().sum().backward()


def test_head_under_autocast_keeps_float32_gradients(report):
    torch.manual_seed(0)
    hidden, weight, ids = leaf(torch.randn(9, 16)), leaf(torch.randn(33, 16)), torch.randint(33, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy, *_ = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, ids, 1.0, 32768, None, 1.0, ("entropy",)
        )
    theirs = THEIRS._ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, 1.0, 32768, None, 1.0, ("entropy",)
    )
    made = gradients((logp, entropy), [hidden, weight])
    near(logp, theirs[0])
    for one, two in zip(made, gradients(theirs[:2], [hidden, weight])):
        assert one.dtype == torch.float32
        near(one, two)


def test_compiled_head(report):
    hidden, weight, ids = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)
    bias = torch.randn(11)
    for outputs, whole in ((("entropy",), True), ((), True), (ALL, False)):

        def call(*tensors, which=outputs):
            return utils._ChunkedLogProbFunction.apply(*tensors, ids, 0.7, 32768, 4.0, 0.5, which)

        made = []
        for function in (torch.compile(call, backend="aot_eager", fullgraph=whole), call):
            mine = [leaf(tensor) for tensor in (hidden, weight, bias)]
            got = function(*mine)
            made.append([*(one for one in got if one is not None), *gradients(got[:2], mine)])
        for one, two in zip(*made, strict=True):
            near(one, two, str(outputs))


def test_edge_cases(report):
    logits = torch.randn(2, 3, 7)
    logits[0, 1, 4] = -float("inf")
    ids = torch.tensor([[0, 1, 2], [3, 5, 6]])
    entropy = utils.entropy_from_logits(leaf(logits))
    assert entropy.isfinite().all() and THEIRS.entropy_from_logits(logits).isnan().any()
    assert utils.selective_log_softmax(logits, torch.full_like(ids, 4))[0, 1] == -float("inf")
    for wrong in (-100, 7, -1):
        with pytest.raises(ValueError, match=f"index: expected 0 <= id < 7, got {wrong}"):
            utils.selective_log_softmax(logits, ids.masked_fill(ids == 6, wrong))
    masked = ids.masked_fill(ids == 6, -100)
    kept = (masked >= 0).long()
    made = utils.selective_log_softmax(leaf(logits), masked, row_mask=kept)
    near(made, THEIRS.selective_log_softmax(logits, ids, row_mask=kept))
    assert made[1, 2] == 0
    assert (utils.selective_log_softmax(logits, masked.fill_(-100), row_mask=torch.zeros(2, 3)) == 0).all()
    assert utils.selective_log_softmax(logits[:0], ids[:0]).shape == (0, 3)
    assert utils.entropy_from_logits(logits[:0]).shape == (0, 3)
    with pytest.raises(RuntimeError):
        THEIRS.selective_log_softmax(logits[:0], ids[:0])
    with pytest.raises(ValueError, match="temperature"):
        utils.selective_log_softmax(logits, ids, temperature=0.0)


def test_edge_cases_of_the_head(report):
    hidden, weight, ids = torch.randn(4, 8), torch.randn(7, 8), torch.tensor([0, 6, 2, 3])

    def apply(ids, bias=None, hidden=hidden):
        return utils._ChunkedLogProbFunction.apply(
            hidden, weight, bias, ids, 1.0, 32768, None, 1.0, ("entropy",)
        )

    for wrong in (7, -100):
        bad = ids.masked_fill(ids == 6, wrong)
        with pytest.raises(ValueError, match=f"targets: expected 0 <= id < 7, got {wrong}"):
            apply(bad)
    theirs = THEIRS._ChunkedLogProbFunction.apply(
        hidden, weight, None, ids.masked_fill(ids == 6, 7), 1.0, 32768
    )
    assert theirs[0].isfinite().all()  # what ours refuses
    bias = torch.zeros(7)
    bias[1] = -float("inf")
    assert apply(ids, bias)[1].isfinite().all()
    assert apply(ids[:0], hidden=hidden[:0])[0].shape == (0,)
    with pytest.raises(ValueError, match="expected hidden"):
        apply(ids[:3])
    assert torch.equal(apply(ids.to(torch.uint8))[0], apply(ids)[0]) and torch.equal(
        apply(ids.int())[1], apply(ids)[1]
    )
    for wrong in (ids + 0.7, ids > 1):
        with pytest.raises(ValueError, match="targets: expected integers"):
            apply(wrong)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = utils._ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, ALL)
    assert made[2].dtype == torch.float32
    zero = [
        function.apply(hidden, weight, None, ids, 1.0, 32768, 0.0, 1.0, ())[0]
        for function in (utils._ChunkedLogProbFunction, THEIRS._ChunkedLogProbFunction)
    ]
    assert torch.equal(*zero)  # a cap of 0 is theirs to make sense of


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        (1.0, 32768, -3.0, 1.0),
        (1.0, 32768, None, -2.0),
        (torch.tensor(2.0), 32768, None, 1.0),
        (1.0, 32768, torch.tensor(3.0), 1.0),
    ],
)
def test_odd_numbers_of_the_head_are_theirs(report, options, learns):
    hidden, weight, ids = torch.randn(4, 8), torch.randn(7, 8), torch.tensor([0, 6, 2, 3])
    made = []
    for function in (utils._ChunkedLogProbFunction, THEIRS._ChunkedLogProbFunction):
        mine = hidden.clone().requires_grad_(learns)
        outputs = function.apply(mine, weight, None, ids, *options, ("entropy",))[:2]
        made.append([*outputs, *(gradients(outputs, [mine]) if learns else ())])
    for one, two in zip(*made):
        assert torch.equal(one, two)


def test_a_temperature_that_learns_gets_its_gradient(report):
    logits, ids = torch.randn(2, 3, 9), torch.randint(9, (2, 3))
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        made = []
        for module in (utils, THEIRS):
            source, temperature = leaf(logits), torch.tensor(2.0, requires_grad=True)
            outputs = getattr(module, name)(source, ids, temperature=temperature)
            outputs = outputs if isinstance(outputs, tuple) else [outputs]
            made.append(gradients(outputs, [source, temperature]))
        for one, two in zip(*made):
            near(one, two, name)
    with torch.no_grad():  # it does not learn here: ours
        near(
            utils.selective_log_softmax(logits, ids, temperature=temperature),
            THEIRS.selective_log_softmax(logits, ids, temperature=2.0),
        )


def test_what_lies_in_rows_that_do_not_count_is_not_read(report):
    logits, ids, mask = torch.randn(2, 3, 9), torch.randint(9, (2, 3)), torch.tensor([[1, 1, 0], [0, 1, 1]])
    poisoned = leaf(logits.masked_fill(mask[..., None] == 0, float("nan")))
    clean = leaf(logits)
    made = [
        gradients(utils.selective_log_softmax_and_entropy(source, ids, row_mask=mask), [source])[0]
        for source in (poisoned, clean)
    ]
    assert torch.equal(*made) and (made[0][mask == 0] == 0).all() and poisoned.isnan().any()
    compiled = torch.compile(
        lambda x: utils.selective_log_softmax(x, ids, row_mask=mask), backend="aot_eager"
    )
    expected = gradients([utils.selective_log_softmax(clean, ids, row_mask=mask)], [clean])[0]
    near(gradients([compiled(poisoned)], [poisoned])[0], expected)
    logp = utils.selective_log_softmax(clean, ids, row_mask=mask)
    (first,) = torch.autograd.grad(logp.sum(), clean, create_graph=True)
    assert (first[mask == 0] == 0).all()
    with pytest.raises(RuntimeError):
        first.square().sum().backward()


def test_every_binding_is_replaced_and_restored():
    import trl.experimental.cpo.cpo_trainer as cpo
    import trl.experimental.orpo.orpo_trainer as orpo
    import trl.kernels as kernels

    before = snapshot(utils, cpo, orpo, kernels)
    report = integrations.patch("trl", quiet=True)
    for module in (utils, cpo, orpo):
        assert module.selective_log_softmax is utils.selective_log_softmax is not HELD["log_softmax"]
        assert (
            f"{module.__name__}.selective_log_softmax"
            in report.replaced["trl.trainer.utils:selective_log_softmax"]
        )
    assert utils._ChunkedLogProbFunction is kernels.ChunkedLogProbFunction is not HELD["head"]
    assert integrations.patch("trl", quiet=True).replaced == report.replaced
    places = integrations.unpatch("trl")
    assert set(places) >= {place for found in report.replaced.values() for place in found}
    same(before, snapshot(utils, cpo, orpo, kernels))


def test_unknown_version_is_refused_by_name(monkeypatch):
    from saferlhf_fast.integrations import replacing

    monkeypatch.setattr(replacing.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(
        integrations.Refused, match=r"trl: expected version 1\.16, got 1\.17\.0; nothing was replaced"
    ):
        integrations.patch("trl")
    assert utils.selective_log_softmax is HELD["log_softmax"] and not integrations.patched()
    with integrations.patch("trl", force=True, quiet=True):
        assert utils.selective_log_softmax is not HELD["log_softmax"]
