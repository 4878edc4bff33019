"""One table, op x bad input: memory layouts, dtypes, devices, shapes, empty tensors, ids outside the vocabulary. What is given is
handled as a torch user expects, or refused by one line with expected and got; never a finite wrong value."""

import weakref

import interpret
import naive
import pytest
import torch
from losses_kit import laid_out
from tolerance import assert_near
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import saferlhf_fast
from saferlhf_fast.kernels import dispatch

pytestmark = pytest.mark.numeric

INTERPRETED = dispatch.interpreted()
B, T, H, V = 2, 5, 4, 7
LOSS = dict(clip_ratio=0.2, clip_high=0.3, dual_clip=1.5, kl_coeff=0.1)
# op: arguments that are tokens [B, T], others by shape, settings, what the gradient goes to.
TABLE = {
    "token_logprob": ((), dict(logits=(B, T, V), ids=(B, T)), dict(return_entropy=True), ("logits",)),
    "linear_logprob": ((), dict(hidden=(B, T, H), weight=(V, H), ids=(B, T), bias=(V,)), dict(return_entropy=True),
                       ("hidden", "weight", "bias")),
    "gae": (("rewards", "values"), {}, dict(gamma=0.9, lam=0.8), ()),
    "ppo_lag_advantage": (("logp", "ref_logp", "reward_values", "cost_values"), dict(reward=(B,), cost=(B,), multiplier=()),
                          dict(kl_coeff=0.1, gamma=0.9, lam=0.8, clip_score=5.0), ()),
    "ppo_loss": (("logp", "old_logp", "advantages", "ref_logp", "entropy"), {}, dict(LOSS, entropy_coeff=0.1),
                 ("logp", "entropy")),
    "ppo_loss_from_logits": (("old_logp", "advantages", "ref_logp"), dict(logits=(B, T, V), ids=(B, T)),
                             dict(LOSS, entropy_coeff=0.1), ("logits",)),
    "linear_ppo_loss": (("old_logp", "advantages", "ref_logp"), dict(hidden=(B, T, H), weight=(V, H), ids=(B, T), bias=(V,)),
                        dict(LOSS, entropy_coeff=0.1), ("hidden", "weight", "bias")),
    "value_loss": (("values", "old_values", "returns"), {}, dict(clip_value=0.3), ("values",)),
}
WITH_IDS = [op for op in TABLE if "ids" in TABLE[op][1]]
PLACES = [place for place in naive.PLACES if place.values[1] == "cpu"]
LAYOUTS = ("offset", "every second", "reversed axes", "expanded")[2 if INTERPRETED else 0:]


def inputs_of(op, empty=None):
    """{name: tensor} of an op, padded. empty: None, or the axis (0 or 1) of the tokens that has no length."""
    tokens, others, _, _ = TABLE[op]
    random = torch.Generator().manual_seed(len(op))
    made = {}
    for name, shape in {**others, **dict.fromkeys(tokens, (B, T)), "mask": (B, T)}.items():
        if empty is not None and shape[:2] == (B, T):
            shape = [0 if at == empty else size for at, size in enumerate(shape)]
        elif empty == 0 and shape == (B,):
            shape = (0,)
        made[name] = torch.randn(shape, generator=random)
        if name == "ids":
            made[name] = torch.randint(V, shape, generator=random)
    if "_logprob" in op:
        del made["mask"]
    else:
        made["mask"] = made["mask"] > -0.5
    return made


class Through(torch.autograd.Function):
    """The same memory as an intermediate result: neither a leaf nor a view of one, so that the in-place paths are taken."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.data

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def call(op, given, impl="auto", **more):
    """(outputs, gradients): every tensor that comes out, and what the sum of the outputs gives the leaves. May write over
    `given`."""
    leaves = {name: given[name].detach().requires_grad_(given[name].dtype.is_floating_point) for name in TABLE[op][3]}
    through = {name: Through.apply(leaf) if leaf.requires_grad else leaf for name, leaf in leaves.items()}
    result = getattr(saferlhf_fast, op)(**{**given, **through}, **TABLE[op][2], **more, impl=impl)
    outputs = []
    for part in result if isinstance(result, tuple) else (result,):
        outputs += part.values() if isinstance(part, dict) else [part]
    losses = [output.sum() for output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(sum(losses), list(leaves.values())) if losses else ()
    return [output.detach() for output in outputs], gradients


def spread(tensor, layout):
    """The tensor in a layout; expanded: each row is the first one, by a stride of 0."""
    if tensor.dim() == 0:
        return tensor
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if tensor.is_floating_point():
        return laid_out(tensor, layout)
    return laid_out(tensor.double(), layout).to(tensor.dtype) if layout == "offset" else \
        tensor.repeat_interleave(2, -1)[..., ::2] if layout == "every second" else tensor.t().contiguous().t() \
        if tensor.dim() == 2 else tensor


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(op, impl, device, layout):
    """The same bits as of contiguous tensors; a head's matrix product is a library's, which may take another way through it."""
    given = {name: spread(tensor, layout) for name, tensor in inputs_of(op).items()}
    plain = {name: tensor.contiguous().clone() for name, tensor in given.items()}
    assert layout == "offset" or not all(tensor.is_contiguous() for tensor in given.values())
    got, expected = call(op, given, impl), call(op, plain, impl)
    for mine, theirs in zip([*got[0], *got[1]], [*expected[0], *expected[1]]):
        if op.startswith("linear_"):
            assert_near(mine, theirs)
        else:
            assert torch.equal(mine, theirs), op
    assert all(output.isfinite().all() for output in got[0])


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("how", ["expanded", "windows"])
def test_nothing_is_written_over_memory_that_elements_share(how, impl, device):
    """Packed rows of logits that are one row, or that overlap: written in place they would spoil one another."""
    base = torch.randn(V if how == "expanded" else V + T - 1)
    given = {name: tensor[0] for name, tensor in inputs_of("ppo_loss_from_logits").items() if name not in ("mask", "logits")}
    arguments = dict(given, clip_ratio=0.2, kl_coeff=0.1, entropy_coeff=0.1, impl=impl)
    gradients = []
    for shared in (True, False):
        leaf = base.clone().requires_grad_()
        logits = leaf.expand(T, V) if how == "expanded" else leaf.unfold(0, V, 1)
        one, two = (logits if shared else logits.clone(memory_format=torch.contiguous_format) for _ in range(2))
        loss, _ = saferlhf_fast.ppo_loss_from_logits(one, **arguments)
        other = saferlhf_fast.token_logprob(two, given["ids"], inplace_backward=True, impl=impl)
        gradients.append((torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(other.sum(), leaf)[0]))
    for mine, theirs in zip(*gradients):
        assert_near(mine, theirs)


def wrong(name, tensor):
    """(what is wrong, the tensor made so) for an argument of that name."""
    yield "dtype", tensor.to(torch.complex64)
    yield "device", tensor.to("meta")
    if tensor.dim():
        yield "shape", tensor[..., :1]
        yield "shape", tensor[None]
    if name == "ids":
        for dtype in (torch.float32, torch.bool):
            yield "dtype", tensor.to(dtype)
    elif name == "mask":
        for dtype in (torch.float32, torch.int64, torch.uint8):
            yield "dtype", tensor.to(dtype)
    elif tensor.dim():
        for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn):
            yield "dtype", tensor.to(dtype)


@pytest.mark.parametrize("op", TABLE)
def test_refused(op):
    """Each argument in turn, of a wrong dtype, shape or device, among right ones: one line with expected and got."""
    given = inputs_of(op)
    for name, tensor in given.items():
        for what, bad in wrong(name, tensor):
            with pytest.raises(ValueError, match="expected") as caught:
                call(op, {**given, name: bad})
            assert "got" in str(caught.value) and "\n" not in str(caught.value), f"{name}: {what}: {caught.value}"


@pytest.mark.parametrize("op", [op for op in TABLE if "_logprob" not in op])
def test_refused_offsets(op):
    given = {name: tensor[0] if tensor.shape[:2] == (B, T) else tensor[:1] if tensor.shape == (B,) else tensor
             for name, tensor in inputs_of(op).items() if name != "mask"}
    right = torch.tensor([0, T], dtype=torch.int32)
    for dtype in (torch.int32, torch.int64):
        assert all(output.isfinite().all() for output in call(op, given, cu_seqlens=right.to(dtype))[0])
    for bad in (right.float(), right.bool(), right.to("meta"), right[None], right[:0], -right, right + 1, right + T,
                right.flip(0), torch.tensor([0, (1 << 32) + T]), torch.tensor([-(1 << 32), T])):
        with pytest.raises(ValueError, match="expected"):
            call(op, given, cu_seqlens=bad)
    with pytest.raises(ValueError, match="expected"):
        call(op, given, cu_seqlens=right, mask=torch.ones(T, dtype=torch.bool))


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", TABLE)
def test_autocast(op, impl, device):
    """Changes no bit: what the ops compute in is float32 in any case."""
    for dtype in (torch.float32, torch.bfloat16):
        made = []
        for enabled in (False, True):
            given = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs_of(op).items()}
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                made.append(call(op, given, impl))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip([*made[0][0], *made[0][1]], [*made[1][0], *made[1][1]]))


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", WITH_IDS)
def test_ids(op, impl, device):
    """Any integer type will do. Outside the vocabulary: refused on the CPU, NaN on a device, for which the interpreter stands."""
    given = inputs_of(op)
    expected = call(op, given, impl)
    for dtype in (torch.int32, torch.uint8) if INTERPRETED else (torch.int32, torch.int16, torch.int8, torch.uint8):
        got = call(op, {**inputs_of(op), "ids": given["ids"].to(dtype)}, impl)
        assert all(torch.equal(a, b) for a, b in zip([*got[0], *got[1]], [*expected[0], *expected[1]]))
    first = (0, int(given["mask"][0].nonzero()[0]) if "mask" in given else 0)
    for bad in (-100, -1, V, 1 << 40):
        ids = given["ids"].clone()
        ids[first] = bad
        if INTERPRETED:
            outputs, gradients = call(op, {**inputs_of(op), "ids": ids}, impl)
            assert outputs[0].isnan().any() and all(gradient.isnan().any() for gradient in gradients)
            continue
        with pytest.raises(ValueError, match=f"{op}: ids: expected 0 <= id < {V}, got {bad}"):
            call(op, {**inputs_of(op), "ids": ids}, impl)


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("axis", [0, 1])
def test_empty(op, impl, device, axis):
    """No row, and rows without a position: nothing, or zeros, and gradients that are zeros of the right shape."""
    given = inputs_of(op, empty=axis)
    outputs, gradients = call(op, given, impl)
    assert all((output == 0).all() for output in outputs if output.dim() < 2 or not output.numel())
    for name, gradient in zip(TABLE[op][3], gradients):
        assert gradient.shape == given[name].shape and (gradient == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", [op for op in TABLE if TABLE[op][3]])
def test_first_derivatives_alone(op, impl, device):
    """create_graph=True gives the same gradients; what would have differentiated them again without a word says so."""
    expected = call(op, inputs_of(op), impl)[1]
    given = inputs_of(op)
    leaves = {name: given[name].requires_grad_() for name in TABLE[op][3]}
    result = getattr(saferlhf_fast, op)(**given, **TABLE[op][2], impl=impl)
    outputs = [part for part in result if torch.is_tensor(part)] if isinstance(result, tuple) else [result]
    total = sum(output.sum() for output in outputs)
    gradients = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, expected))
    for gradient in gradients:      # asked for by .backward(), and by each input, whatever else depends on it
        with pytest.raises(RuntimeError, match=f"^{op} has first derivatives alone"):
            gradient.square().sum().backward(retain_graph=True)
        for leaf in leaves.values():
            with pytest.raises(RuntimeError, match=f"^{op} has first derivatives alone"):
                torch.autograd.grad(total + gradient.square().sum(), leaf, retain_graph=True)
            with pytest.raises(RuntimeError, match=f"^{op} has first derivatives alone"):
                (total + gradient.square().sum()).backward(inputs=[leaf], retain_graph=True)
    # One input that needs no gradient among others: nothing is mixed up.
    first = next(iter(leaves))
    result = getattr(saferlhf_fast, op)(**{**given, first: leaves[first].detach()}, **TABLE[op][2], impl=impl)
    for name in list(leaves)[1:]:
        output = (result[0] if isinstance(result, tuple) else result).sum()
        alone, = torch.autograd.grad(output, leaves[name], retain_graph=True)
        assert torch.equal(torch.autograd.grad(output, leaves[name], create_graph=True)[0], alone)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("op", [op for op in TABLE if TABLE[op][3]])
def test_other_derivatives(op):
    """Forward mode and torch.func's transforms are refused, never 0; torch.vmap gives what a loop gives, gradients too."""
    for name in TABLE[op][3]:
        given = inputs_of(op)

        def run(tensor):
            return first(getattr(saferlhf_fast, op)(**{**given, name: tensor}, **TABLE[op][2])).sum()       # noqa: B023

        tangent = torch.ones_like(given[name])
        for way in (torch.func.jvp, lambda run, at, _: torch.func.jacfwd(run)(*at)):
            with pytest.raises(RuntimeError, match=f"^{op} has no forward-mode derivative"):
                way(run, (given[name],), (tangent,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            run(torch.autograd.forward_ad.make_dual(given[name].clone(), tangent))
        for way in (torch.func.grad(run), torch.func.jacrev(run), torch.func.hessian(run)):
            with pytest.raises(RuntimeError):
                way(given[name].clone())
        with pytest.raises(RuntimeError, match="first derivatives alone"):
            torch.autograd.functional.hvp(run, given[name].clone(), tangent)
        two = torch.stack([given[name], given[name].flip(0)]).requires_grad_()
        for factor in (None, 1):                            # of a leaf, and of what may be written over
            expected = torch.stack([run(row.clone()) for row in two])
            got = torch.vmap(run)(two if factor is None else two * factor)
            assert_near(got, expected)                      # torch's sums, over rows of another number
            with pytest.raises(RuntimeError, match=f"^{op} has first derivatives alone"):
                torch.autograd.grad(got.sum(), two, create_graph=True, retain_graph=True)
            assert torch.equal(torch.autograd.grad(got.sum(), two)[0], torch.autograd.grad(expected.sum(), two)[0])


class Made(TorchDispatchMode):
    """Bytes that the calls of torch made, views and results in place left out. On a CPU zeros cost no resident memory until they
    are written, on a device they cost the allocation and a pass over it."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        given = {part.untyped_storage().data_ptr() for part in tree_leaves((arguments, named)) if torch.is_tensor(part)}
        self.bytes += sum(part.nbytes for part in tree_leaves(result)
                          if torch.is_tensor(part) and part.untyped_storage().data_ptr() not in given)
        return result


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op, options", [*((op, {}) for op in TABLE if TABLE[op][3]),
                                         ("ppo_loss_from_logits", dict(inplace=False))])
def test_backward_makes_the_gradients_and_nothing_of_their_size(op, options, impl, device):
    """No zeros for outputs that nobody differentiates: d weight is one, of 2 GB at V = 128256 and H = 4096."""
    given = inputs_of(op)
    leaves = {name: given[name].requires_grad_() for name in TABLE[op][3]}
    through = {name: Through.apply(leaf) for name, leaf in leaves.items()}
    output = first(getattr(saferlhf_fast, op)(**{**given, **through}, **TABLE[op][2], **options, impl=impl))
    upstream = torch.ones_like(output)
    with Made() as made:
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    written = sum(gradient.nbytes for gradient in gradients)
    if op == "ppo_loss_from_logits" and not options:        # in the logits' memory
        written = 0
    assert written <= made.bytes <= written + 16            # and scalars: the upstream gradient times 1/Z


class Nothing(torch.autograd.Function):
    """Gives no gradient back, not even zeros."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", [op for op in TABLE if TABLE[op][3]])
def test_no_upstream_gradient_gives_none(op, create_graph):
    given = inputs_of(op)
    leaves = [given[name].requires_grad_() for name in TABLE[op][3]]
    loss = Nothing.apply(first(getattr(saferlhf_fast, op)(**given, **TABLE[op][2]))).sum()
    assert torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True) == (None,) * len(leaves)


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "linear_ppo_loss", "ppo_loss_from_logits"])
def test_what_makes_its_gradient_in_forward_keeps_no_input(op):
    """To refuse second derivatives the inputs' history is remembered, not their memory."""
    given, name = inputs_of(op), TABLE[op][3][0]
    given[name] = given[name].requires_grad_() * 1
    held = weakref.ref(given[name])
    loss = first(getattr(saferlhf_fast, op)(**given, **TABLE[op][2], **({"inplace": False} if "logits" in given else {})))
    del given
    assert loss.requires_grad and held() is None


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("impl, device", PLACES)
def test_nobodys_parameter_is_written_over(impl, device):
    """A table of logits that is a Parameter: no view of it may hold a gradient afterwards."""
    given = {name: tensor[0] for name, tensor in inputs_of("ppo_loss_from_logits").items() if name != "mask"}
    views = (lambda p: p[0], lambda p: p.view(2, T, V)[0], lambda p: p[None][0, 0],
             lambda p: p.unbind(0)[0][:, :], lambda p: p[0, :T])
    for view in views:
        table = torch.nn.Parameter(torch.stack([given["logits"], given["logits"]]))
        before = table.detach().clone()
        loss, _ = saferlhf_fast.ppo_loss_from_logits(**{**given, "logits": view(table)}, clip_ratio=0.2, kl_coeff=0.1, impl=impl)
        made, = torch.autograd.grad(loss, table)
        (-saferlhf_fast.token_logprob(view(table), given["ids"], inplace_backward=True, impl=impl).sum()).backward()
        assert torch.equal(table, before)
        safe, _ = saferlhf_fast.ppo_loss_from_logits(
            **{**given, "logits": view(table)}, clip_ratio=0.2, kl_coeff=0.1, inplace=False, impl=impl)
        assert torch.equal(made, torch.autograd.grad(safe, table)[0])
    # What is no parameter is written over: nothing above passes because nothing ever is.
    logits = given["logits"].clone().requires_grad_() * 1
    before = logits.detach().clone()
    saferlhf_fast.ppo_loss_from_logits(**{**given, "logits": logits}, clip_ratio=0.2, kl_coeff=0.1, impl=impl)
    assert not torch.equal(logits, before)


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"] if INTERPRETED else [op for op in TABLE if "loss" in op])
def test_normalizer(op, impl, device):
    """0 is no token anywhere: all 0. What is no count is refused as a number, and makes a NaN as a tensor, which is not read."""
    for bad in (-1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=f"{op}: normalizer: expected a number >= 0, got {bad}"):
            call(op, inputs_of(op), impl, normalizer=bad)
    for none in (0, 0.0, torch.tensor(0.0), torch.tensor(0)):
        outputs, gradients = call(op, inputs_of(op), impl, normalizer=none)
        assert outputs[0] == 0 and all((gradient == 0).all() for gradient in gradients)
    for bad in (-1.0, float("nan")):
        given = inputs_of(op)
        outputs, gradients = call(op, given, impl, normalizer=torch.tensor(bad))
        assert outputs[0].isnan() and all(gradient.isnan().any() for gradient in gradients)
        assert all(output.isfinite() for output in outputs[1:])
        if "logits" in given:
            assert (gradients[0][~given["mask"]] == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="on a device, for which the interpreter stands, nobody looks")
@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", WITH_IDS)
def test_temperatures(op, impl, device):
    """Tensors of them: refused on the CPU where one is no number > 0, but where it is masked."""
    for bad in (0.0, -1.0, float("nan")):
        given = inputs_of(op)
        with pytest.raises(ValueError, match=f"{op}: temperature: expected numbers > 0, got {bad}"):
            call(op, given, impl, temperature=torch.tensor(bad))
        temperature = torch.ones(B, T)
        temperature[tuple(given["mask"].nonzero()[-1]) if "mask" in given else (1, 2)] = bad
        with pytest.raises(ValueError, match=f"{op}: temperature: expected numbers > 0, got {bad}"):
            call(op, inputs_of(op), impl, temperature=temperature)
        if "mask" in given:
            temperature = torch.where(given["mask"], 1.0, bad)
            outputs, gradients = call(op, inputs_of(op), impl, temperature=temperature)
            assert all(made.isfinite().all() for made in (*outputs, *gradients))


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("at", ["the id"] if INTERPRETED else ["the id", "another"])
@pytest.mark.parametrize("op", WITH_IDS)
def test_infinite_logit(op, at, impl, device):
    """+inf has no distribution: log-prob, entropy and the row's gradient are NaN, and no other row's."""
    given = inputs_of(op)
    hit = tuple(given["mask"].nonzero()[0]) if "mask" in given else (0, 0)
    column = given["ids"][hit] if at == "the id" else (given["ids"][hit] + 1) % V
    if "logits" in given:
        given["logits"][(*hit, column)] = float("inf")
    else:
        given["bias"][column] = float("inf")
    if op == "linear_logprob":
        with torch.no_grad():      # in Triton another kernel
            assert saferlhf_fast.linear_logprob(**given, impl=impl)[hit].isnan()
    outputs, gradients = call(op, given, impl)
    if "loss" in op:
        assert outputs[0].isnan()
    else:
        assert all(output[hit].isnan() for output in outputs)
    assert gradients[0][hit].isnan().all()
    if "logits" in given:
        gradients[0][hit] = 0
        assert gradients[0].isfinite().all()


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_triton_in_the_interpreter():
    interpret.run(__file__, "-k", "not refused")
