"""TRL's patched functions under transforms, in other processes and in the library's own dtype.

In an environment with TRL 1.16.
"""

import copy
import functools
import pickle
import sys
import types

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed here")
import trl.trainer.utils as utils  # noqa: E402
from integration_kit import Batches, gradients, leaf, near, not_worse, pristine  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from saferlhf_fast import integrations  # noqa: E402

THEIRS = pristine(utils)
# A patch rebinds names of modules, of this one too, but not what a dictionary holds.
HELD = {"head": utils._ChunkedLogProbFunction}
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
torch.manual_seed(0)
LOGITS, IDS = torch.randn(4, 3, 9), torch.randint(9, (4, 3))
WEIGHT = torch.randn(9, 5)


@pytest.fixture
def patched():
    with integrations.patch("trl", quiet=True) as report:
        yield report


def _head(hidden, ids, module=utils, outputs=ALL):
    """TRL's head: patched, or TRL's own."""
    function = HELD["head"] if module is THEIRS else module._ChunkedLogProbFunction
    return function.apply(hidden, WEIGHT, None, ids, 0.7, 32768, 4.0, 0.5, outputs)


# {function: (its call, the input that may learn)}; the calls take rows, as the library's own do
CASES = {
    "selective_log_softmax": (lambda x, i, m=utils: m.selective_log_softmax(x, i), LOGITS),
    "masked": (lambda x, i, m=utils: m.selective_log_softmax(x, i, temperature=0.5, row_mask=i > 2), LOGITS),
    "entropy_from_logits": (lambda x, i, m=utils: m.entropy_from_logits(x), LOGITS),
    "both": (lambda x, i, m=utils: sum(m.selective_log_softmax_and_entropy(x, i)), LOGITS),
    "head": (lambda x, i, m=utils: sum(_head(x, i, m, ("entropy",))[:2]), torch.randn(4, 3, 5)),
}
SINGLE = {"head"}  # takes tokens [N], not rows of them


def _rows(name, module):
    """The case as a function of one row, as torch.vmap gives it."""
    call = CASES[name][0]
    if name in SINGLE:
        return lambda x, i: call(x, i, module)
    return lambda x, i: call(x[None], i[None], module)[0]


def _expected(name):
    """Inputs [4, …], TRL's own results of them outside transforms, and the gradient of the results' sum."""
    theirs, x = _rows(name, THEIRS), leaf(CASES[name][1])
    results = torch.stack([theirs(one, i) for one, i in zip(x, IDS)])
    (gradient,) = torch.autograd.grad(results.sum(), x)
    return x.detach(), results.detach(), gradient


@pytest.mark.parametrize("name", CASES)
def test_transforms_give_what_the_library_gives_without_them(patched, name):
    rows, (x, plain, gradient) = _rows(name, utils), _expected(name)

    def loss(one, i):
        return rows(one, i).sum()

    near(torch.vmap(rows)(x, IDS), plain, "vmap")
    near(torch.func.grad(loss)(x[0], IDS[0]), gradient[0], "grad")
    near(torch.vmap(torch.func.grad(loss))(x, IDS), gradient, "vmap(grad)")
    along = (x[0],), (torch.ones_like(x[0]),)
    near(torch.func.jvp(lambda a: rows(a, IDS[0]), *along)[1].sum(), gradient[0].sum(), "jvp")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        tangent = torch.autograd.forward_ad.unpack_dual(rows(dual, IDS[0])).tangent
    near(tangent.sum(), gradient[0].sum(), "dual tensors")
    near(torch.jit.trace(rows, (x[0], IDS[0]), check_trace=False)(x[1], IDS[1]), plain[1], "jit")
    near(make_fx(rows)(x[0], IDS[0])(x[1], IDS[1]), plain[1], "make_fx")
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the head has a weight of its own
    inputs = mode.from_tensor(x), mode.from_tensor(IDS)
    with mode:
        fake = rows(*(tensor[0] for tensor in inputs))
    assert fake.shape == plain[0].shape and fake.dtype == plain.dtype
    assert not sum(patched.calls[target] for target in patched.calls if "_Chunked" in target)


@pytest.mark.slow  # torch.compile, and transforms of transforms
@pytest.mark.parametrize("name", CASES)
def test_compiled_transforms_and_second_derivatives(patched, name):
    rows, (x, plain, gradient) = _rows(name, utils), _expected(name)

    def loss(one, i):
        return rows(one, i).sum()

    near(torch.func.jacrev(rows)(x[0], IDS[0]).sum(0), gradient[0], "jacrev")
    hessian = torch.func.hessian(lambda a: loss(a, IDS[0]))(x[0])
    assert hessian.isfinite().all() and hessian.abs().sum() > 0
    compiled = torch.compile(lambda a, i: torch.vmap(rows)(a, i), backend="aot_eager", fullgraph=True)
    near(compiled(x, IDS), plain, "compiled vmap")
    compiled = torch.compile(lambda a, i: torch.func.grad(loss)(a, i), backend="aot_eager", fullgraph=True)
    near(compiled(x[0], IDS[0]), gradient[0], "compiled grad")
    compiled = torch.compile(rows, backend="aot_eager", fullgraph=True)
    near(compiled(x[0], IDS[0]), plain[0], "compiled")


def test_tensors_without_values(patched, monkeypatch):
    logits, ids, hidden = LOGITS.to("meta"), IDS.to("meta"), torch.empty(3, 5, device="meta")
    monkeypatch.setitem(globals(), "WEIGHT", WEIGHT.to("meta"))
    assert utils.selective_log_softmax(logits, ids).shape == (4, 3)
    made = _head(hidden, ids[0])
    assert [one.is_meta and one.shape == (3,) for one in made] == [True] * 5
    assert [one.dtype for one in made] == [torch.float32] * 4 + [torch.bool]


def test_the_head_under_vmap_gives_its_extras(patched):
    hidden = torch.randn(4, 3, 5)
    for outputs in ((), ("entropy",), ("mean_logits", "is_top1"), ALL):
        made = torch.vmap(
            lambda h, i, o=outputs: tuple(one for one in _head(h, i, outputs=o) if one is not None)
        )(hidden, IDS)
        expected = [
            one for one in _head(hidden.reshape(12, 5), IDS.reshape(12), THEIRS, outputs) if one is not None
        ]
        for one, two in zip(made, expected, strict=True):
            near(one.reshape(12).float(), two.float(), str(outputs))


class Trainer:
    """Holds what a trainer of the library may hold."""

    def __init__(self):
        self.head, self.apply = utils._ChunkedLogProbFunction, utils._ChunkedLogProbFunction.apply
        self.log_probs = functools.partial(utils.selective_log_softmax, temperature=0.5)
        self.functions = [utils.entropy_from_logits, utils.selective_log_softmax_and_entropy]


def test_what_holds_patched_functions_can_be_copied_and_sent(patched):
    trainer = Trainer()
    trainer.report = patched
    cloudpickle = pytest.importorskip("cloudpickle")
    copies = [copy.deepcopy(trainer), *(pickle.loads(pickle.dumps(trainer, n)) for n in (2, 4, 5))]
    copies.append(cloudpickle.loads(cloudpickle.dumps(trainer)))
    for copied in copies:
        assert copied.head is trainer.head and copied.apply is trainer.apply
        assert copied.log_probs.func is utils.selective_log_softmax and copied.functions == trainer.functions
        assert copied.report.replaced == patched.replaced and copied.report.undo is None
    sent = pickle.dumps(trainer)
    integrations.unpatch("trl")
    read = pickle.loads(sent)  # as in a process that is not patched
    assert read.head is HELD["head"] and read.log_probs.func is utils.selective_log_softmax
    assert HELD["head"] is utils._ChunkedLogProbFunction


def test_names_in_other_modules_are_reported_and_restored(monkeypatch, capsys):
    names = ("selective_log_softmax", "_ChunkedLogProbFunction")
    script = types.ModuleType("script_of_a_user")
    for name in names:
        setattr(script, name, getattr(utils, name))
        monkeypatch.setattr(sys.modules["__main__"], name, getattr(utils, name), raising=False)
    monkeypatch.setitem(sys.modules, script.__name__, script)
    before = {name: getattr(utils, name) for name in names}
    report = integrations.patch("trl", quiet=True)
    places = [f"{module}.{name}" for module in ("__main__", script.__name__) for name in names]
    assert set(places) <= set(report.rebound)
    assert not [place for place in report.rebound if place.startswith("trl.")]
    assert not capsys.readouterr().out
    report.show()
    assert "rebound   in modules outside trl: __main__." in capsys.readouterr().out
    assert set(places) <= set(integrations.unpatch("trl"))
    for holder in (sys.modules["__main__"], script, utils):
        for name in names:
            assert getattr(holder, name) is before[name]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_in_the_librarys_own_dtype(kind):
    with integrations.patch("trl", quiet=True, dtype="input") as report:
        assert report.dtype == "input"
        with pytest.raises(ValueError, match="dtype: expected 'input', with which it is patched already"):
            integrations.patch("trl")
        for batch in Batches(8):
            logits = batch.normal(batch.whole(1, 4), batch.whole(1, 7), batch.whole(2, 99), scale=3).to(kind)
            ids = batch.ids(logits.shape[-1], *logits.shape[:2])
            options = {
                "temperature": batch.pick(1.0, 0.7),
                "row_mask": batch.pick(None, batch.ids(2, *ids.shape)),
            }
            mine, other, exact = leaf(logits), leaf(logits), leaf(logits.double())
            made = []
            for source, module in ((mine, utils), (other, THEIRS), (exact, THEIRS)):
                both = module.selective_log_softmax_and_entropy(source, ids, **options)
                made.append(
                    [
                        module.selective_log_softmax(source, ids, **options),
                        *both,
                        module.entropy_from_logits(source),
                    ]
                )
            for got, expected, truth in zip(*made):
                assert got.dtype == expected.dtype == kind
                near(got, expected, str(batch))
                # rounding to the narrower dtype is all that is lost
                assert ((got.double() - truth).abs() <= truth.abs() * torch.finfo(kind).eps + 1e-5).all()
                not_worse(got, expected, truth, str(batch))
            for got, expected in zip(gradients(made[0], [mine]), gradients(made[1], [other])):
                assert got.dtype == expected.dtype
        flat = torch.zeros(6, dtype=kind)
        logits, ids = torch.randn(2, 3, 9).to(kind), torch.arange(6).reshape(2, 3)
        flat.index_copy_(0, torch.arange(6), utils.selective_log_softmax(logits, ids).flatten())
    with integrations.patch("trl", quiet=True):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        assert utils.selective_log_softmax(logits, ids).dtype == wide
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'input', got 'bfloat16'"):
        integrations.patch("trl", dtype="bfloat16")
