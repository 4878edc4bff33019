"""pack and unpack: any pattern of the mask, any dtype, gradients, and what is refused."""

import pytest
import torch

from saferlhf_fast import pack, unpack


def loop(padded, mask):
    """The definition: tokens row by row, one at a time."""
    tokens = [padded[b, t] for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]
    ends = [int(mask[:b].sum()) for b in range(mask.shape[0] + 1)]
    return (torch.stack(tokens) if tokens else padded.new_empty(0, *padded.shape[2:])), ends


MASKS = {
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "right": [[1, 1, 0, 0], [1, 0, 0, 0]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1]],
    "empty row": [[0, 0, 0, 0], [1, 1, 1, 1]],
    "all masked": [[0, 0], [0, 0]],
    "no rows": torch.zeros(0, 3),
    "no columns": torch.zeros(2, 0),
    "one token": [[1]],
}


@pytest.mark.parametrize("rest", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", MASKS)
def test_there_and_back(name, rest):
    mask = torch.as_tensor(MASKS[name]).bool()
    padded = torch.randn(*mask.shape, *rest, generator=torch.Generator().manual_seed(1))
    packed, cu_seqlens = pack(padded, mask)
    expected, ends = loop(padded, mask)
    assert torch.equal(packed, expected) and cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == ends
    back = unpack(packed, cu_seqlens, mask=mask, fill=7)
    shaped = mask.reshape(*mask.shape, *[1] * len(rest)).expand_as(padded)
    assert torch.equal(back, padded.where(shaped, torch.tensor(7.0)))
    left = unpack(packed, cu_seqlens, width=mask.shape[1] + 1)
    assert left.shape == (mask.shape[0], mask.shape[1] + 1, *rest)
    for b in range(mask.shape[0]):
        n = int(mask[b].sum())
        assert torch.equal(left[b, :n], packed[ends[b] : ends[b + 1]]) and not left[b, n:].any()
    assert torch.equal(pack(left, torch.arange(left.shape[1]) < mask.sum(1)[:, None])[0], packed)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool]
)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8])
def test_dtypes_and_several_at_once(dtype, mask_dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(mask_dtype)
    ids, other = torch.arange(6).reshape(2, 3).to(dtype), torch.randn(2, 3, 4)
    (packed, also), cu_seqlens = pack([ids.t().contiguous().t(), other], mask)  # not contiguous
    assert packed.dtype == dtype and also.shape == (4, 4) and torch.equal(packed, ids[mask.bool()])
    back, back_too = unpack((packed, also), cu_seqlens, mask=mask)
    assert back.dtype == dtype and torch.equal(back, ids.where(mask.bool(), torch.zeros((), dtype=dtype)))
    assert torch.equal(back_too[mask.bool()], also)


def test_a_default_width_is_the_longest_row():
    assert unpack(torch.ones(4), torch.tensor([0, 1, 1, 4])).tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert unpack(torch.ones(0), torch.tensor([0])).shape == (0, 0)
    assert unpack(torch.ones(1, dtype=torch.long), torch.tensor([0, 1]), width=2, fill=-100).tolist() == [
        [1, -100]
    ]


def test_any_fill_that_the_dtype_holds():
    offsets = torch.tensor([0, 1])
    for dtype, fill in [
        (torch.uint8, 255),
        (torch.int8, -128),
        (torch.bool, True),
        (torch.float16, float("-inf")),
        (torch.bfloat16, 1e30),
        (torch.int64, -1.0),
        (torch.int64, 2**63 - 1),
        (torch.bfloat16, -100),
        (torch.bfloat16, 0.1),
        (torch.float32, 2**24),
        (torch.float64, 2**60),
        (torch.complex64, 1 - 2j),
        (torch.float32, torch.tensor(7.0)),
    ]:
        got = unpack(torch.ones(1, dtype=dtype), offsets, width=2, fill=fill)
        assert got.dtype == dtype and torch.equal(got[0, 1], torch.as_tensor(fill).to(dtype))
    assert unpack(torch.ones(1), offsets, width=2, fill=float("nan"))[0, 1].isnan()


@pytest.mark.numeric
def test_gradients():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    padded = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, mask)[0], padded)
    packed, cu_seqlens = pack(padded.detach(), mask)
    assert torch.autograd.gradcheck(lambda x: unpack(x, cu_seqlens, mask=mask), packed.requires_grad_())
    poisoned = torch.full((3, 3), float("nan"), requires_grad=True)
    pack(poisoned, mask)[0].sum().backward()
    assert torch.equal(poisoned.grad, mask.float())


@pytest.mark.numeric
def test_ops_give_the_same_on_both_forms():
    from saferlhf_fast import gae

    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    rewards, values = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    (r, v), cu_seqlens = pack((rewards, values), mask)
    packed = gae(r, v, gamma=0.9, lam=0.8, cu_seqlens=cu_seqlens)[0]
    torch.testing.assert_close(
        unpack(packed, cu_seqlens, mask=mask), gae(rewards, values, gamma=0.9, lam=0.8, mask=mask)[0]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.ones(2, 3), torch.ones(2, 3)), "booleans .*float32"),
        (lambda: pack(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long) * 2), "other integers"),
        (lambda: pack(torch.ones(2, 3), -torch.ones(2, 3, dtype=torch.long)), "other integers"),
        (lambda: pack(torch.ones(2, 3), torch.ones(6, dtype=torch.bool)), r"\[B, T\]"),
        (
            lambda: pack([torch.ones(2, 3), torch.ones(3, 2)], torch.ones(2, 3, dtype=torch.bool)),
            r"padded\[1\].*\[3, 2\]",
        ),
        (
            lambda: pack(torch.ones(2, 3, device="meta"), torch.ones(2, 3, dtype=torch.bool)),
            "device cpu .*meta",
        ),
        (lambda: unpack(torch.ones(3), torch.tensor([0, 2])), "N = .*2, got"),
        (lambda: unpack(torch.ones(3), torch.tensor([0, 4, 3])), "never fall"),
        (lambda: unpack(torch.ones(3), torch.tensor([1, 3])), "start at 0"),
        (lambda: unpack(torch.ones(3), torch.tensor([0.0, 3.0])), "int32 offsets"),
        (lambda: unpack(torch.ones(3), torch.tensor([0, 3]), width=2), "longest row's 3, got 2"),
        (
            lambda: unpack(torch.ones(3), torch.tensor([0, 3]), mask=torch.ones(1, 4, dtype=torch.bool)),
            "3 ones in row 0, got 4",
        ),
        (
            lambda: unpack(torch.ones(3), torch.tensor([0, 3]), mask=torch.ones(2, 3, dtype=torch.bool)),
            "expected 1 rows, got 2",
        ),
        (lambda: unpack(torch.ones(3), torch.tensor([0, 3]), mask=torch.ones(1, 3), width=3), "both"),
        (lambda: unpack(torch.ones(3, dtype=torch.long), torch.tensor([0, 3]), fill=0.5), "an integer"),
        (
            lambda: unpack(torch.ones(3, dtype=torch.long), torch.tensor([0, 3]), fill=float("nan")),
            "an integer",
        ),
        (
            lambda: unpack(torch.ones(3, dtype=torch.uint8), torch.tensor([0, 3]), fill=-1),
            r"0 … 255 .*uint8, got -1",
        ),
        (
            lambda: unpack(torch.ones(3, dtype=torch.bool), torch.tensor([0, 3]), fill=2),
            r"0 … 1 .*bool, got 2",
        ),
        (
            lambda: unpack(torch.ones(3, dtype=torch.int8), torch.tensor([0, 3]), fill=300),
            r"-128 … 127 .*int8, got 300",
        ),
        (
            lambda: unpack(torch.ones(3, dtype=torch.float16), torch.tensor([0, 3]), fill=1e6),
            "65504 .*float16, got 1000000",
        ),
        (
            lambda: unpack(torch.ones(3), torch.tensor([0, 3]), width=5.5),
            "width: expected a whole number of columns, got 5.5",
        ),
        (lambda: unpack(torch.ones(3), torch.tensor([0, 3]), width=True), "width: .*got True"),
        *(
            (
                lambda dtype=dtype: pack(
                    torch.ones(2, 3, device="meta"), torch.ones(2, 3, dtype=dtype, device="meta")
                ),
                "pack: mask: expected a device with values, got meta",
            )
            for dtype in (torch.bool, torch.long)
        ),
        *(
            (
                lambda dtype=dtype: unpack(
                    torch.ones(3), torch.tensor([0, 3]), mask=torch.ones(1, 3, dtype=dtype, device="meta")
                ),
                "unpack: mask: expected a device with values, got meta",
            )
            for dtype in (torch.bool, torch.long)
        ),
        (
            lambda: unpack(torch.ones(3, device="meta"), torch.tensor([0, 3], device="meta")),
            "unpack: cu_seqlens: expected a device with values, got meta",
        ),
        *(
            (
                lambda fill=fill, dtype=dtype: unpack(
                    torch.ones(3, dtype=dtype), torch.tensor([0, 3]), fill=fill
                ),
                message,
            )
            for fill, dtype, message in [
                (
                    "a",
                    torch.float32,
                    "fill: expected a real number for packed of dtype torch.float32, got 'a'",
                ),
                (None, torch.long, "fill: expected a real number .* got None"),
                (1j, torch.float32, "fill: expected a real number .* got 1j"),
                ("a", torch.complex64, "fill: expected a number .* got 'a'"),
                (10**400, torch.float32, r"fill: expected at most 3.40282e\+38 .* got a number of 1329 bits"),
                (
                    -(10**400),
                    torch.float64,
                    r"fill: expected at most 1.79769e\+308 .* got a number of 1329 bits",
                ),
                (10**400, torch.complex128, "fill: expected at most .* got a number of 1329 bits"),
                (10**400, torch.int64, "fill: expected -9223372036854775808 … .* got a number of 1329 bits"),
                (2**63, torch.int64, "got 9223372036854775808"),
                (
                    257,
                    torch.bfloat16,
                    "expected an integer that torch.bfloat16 holds for packed, got 257, which would become "
                    "256",
                ),
                (16777217, torch.float32, "got 16777217, which would become 16777216"),
                (2049, torch.float16, "got 2049, which would become 2048"),
                (torch.tensor(257), torch.bfloat16, "got 257, which would become 256"),
                (2**53 + 1, torch.float64, "got 9007199254740993, which would become 9007199254740992"),
            ]
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
