"""One table, op x bad input: memory layouts, dtypes, devices, shapes, empty tensors, ids outside the
vocabulary. What is given is handled as a torch user expects, or refused by one line with expected and got;
never a finite wrong value.
"""

import pytest
import torch
from op_table import INTERPRETED, LAYOUTS, PLACES, TABLE, WITH_IDS, B, T, V, call, inputs_of, spread
from tolerance import assert_near

import saferlhf_fast

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(op, impl, device, layout):
    """The same bits as of contiguous tensors; a head's matrix product is a library's, which may take another
    way through it.
    """
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
    """Packed rows of logits that are one row, or that overlap: in place they would spoil one another."""
    base = torch.randn(V if how == "expanded" else V + T - 1)
    given = {
        name: tensor[0]
        for name, tensor in inputs_of("ppo_loss_from_logits").items()
        if name not in ("mask", "logits")
    }
    arguments = dict(given, clip_ratio=0.2, kl_coeff=0.1, entropy_coeff=0.1, impl=impl)
    gradients = []
    for shared in (True, False):
        leaf = base.clone().requires_grad_()
        logits = leaf.expand(T, V) if how == "expanded" else leaf.unfold(0, V, 1)
        one, two = (
            logits if shared else logits.clone(memory_format=torch.contiguous_format) for _ in range(2)
        )
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
    """Each argument in turn, of a wrong dtype, shape or device, among right ones: one line with expected and
    got.
    """
    given = inputs_of(op)
    for name, tensor in given.items():
        for what, bad in wrong(name, tensor):
            with pytest.raises(ValueError, match="expected") as caught:
                call(op, {**given, name: bad})
            assert "got" in str(caught.value) and "\n" not in str(caught.value), (
                f"{name}: {what}: {caught.value}"
            )


@pytest.mark.parametrize("op", [op for op in TABLE if "_logprob" not in op])
def test_refused_offsets(op):
    given = {
        name: tensor[0] if tensor.shape[:2] == (B, T) else tensor[:1] if tensor.shape == (B,) else tensor
        for name, tensor in inputs_of(op).items()
        if name != "mask"
    }
    right = torch.tensor([0, T], dtype=torch.int32)
    for dtype in (torch.int32, torch.int64):
        assert all(output.isfinite().all() for output in call(op, given, cu_seqlens=right.to(dtype))[0])
    for bad in (
        right.float(),
        right.bool(),
        right.to("meta"),
        right[None],
        right[:0],
        -right,
        right + 1,
        right + T,
        right.flip(0),
        torch.tensor([0, (1 << 32) + T]),
        torch.tensor([-(1 << 32), T]),
    ):
        with pytest.raises(ValueError, match="expected"):
            call(op, given, cu_seqlens=bad)
    with pytest.raises(ValueError, match="expected"):
        call(op, given, cu_seqlens=right, mask=torch.ones(T, dtype=torch.bool))


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", TABLE)
def test_autocast(op, impl, device):
    """Changes no bit: what the ops compute in is float32 in any case."""
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16):
        made = []
        for enabled in (False, True):
            given = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in inputs_of(op).items()
            }
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                made.append(call(op, given, impl))
        assert all(
            torch.equal(mine, theirs)
            for mine, theirs in zip([*made[0][0], *made[0][1]], [*made[1][0], *made[1][1]])
        )


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", WITH_IDS)
def test_ids(op, impl, device):
    """Any integer type will do. Outside the vocabulary: refused on the CPU, NaN on a device, for which the
    interpreter stands.
    """
    given = inputs_of(op)
    expected = call(op, given, impl)
    for dtype in (torch.uint8,) if INTERPRETED else (torch.int32, torch.int16, torch.int8, torch.uint8):
        got = call(op, {**inputs_of(op), "ids": given["ids"].to(dtype)}, impl)
        assert all(torch.equal(a, b) for a, b in zip([*got[0], *got[1]], [*expected[0], *expected[1]]))
    first = (0, int(given["mask"][0].nonzero()[0]) if "mask" in given else 0)
    for bad in (-1, 1 << 40) if INTERPRETED else (-100, -1, V, 1 << 40):
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
    """No row, and rows without a position: nothing, or zeros, and gradients that are zeros of the right
    shape.
    """
    given = inputs_of(op, empty=axis)
    outputs, gradients = call(op, given, impl)
    assert all((output == 0).all() for output in outputs if output.dim() < 2 or not output.numel())
    for name, gradient in zip(TABLE[op][3], gradients):
        assert gradient.shape == given[name].shape and (gradient == 0).all()


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize(
    "op", ["ppo_loss", "value_loss"] if INTERPRETED else [op for op in TABLE if "loss" in op]
)
def test_normalizer(op, impl, device):
    """0 is no token anywhere: all 0. What is no count is refused as a number, and makes a NaN as a tensor,
    which is not read.
    """
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
        with torch.no_grad():  # in Triton another kernel
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
