"""What the Triton versions launch for more than 2^31 elements, recorded on meta tensors instead of run.

Rows are on axis x of the grid (y and z end at 65,535), and what is launched is what tests/support/aot.py
compiles. That offsets inside a kernel are wide enough is read from its ttir: tests/support/ttir.py, tested
here; tests/kernels/test_compile.py does so for every kernel.
"""

import sys
from importlib import import_module

import aot
import pytest
import torch
from ttir import narrow_offsets

from saferlhf_fast.kernels import dispatch

PAST = 2**31
MANY = 70_001  # rows: past the 65,535 that axes y and z of a grid may have
VOCABULARY = 151_936


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def logit_arguments():
    return meta(MANY, VOCABULARY), meta(MANY, dtype=torch.int64)


def token_arguments(count, packed):
    """`count` token tensors and (cu_seqlens, mask): MANY rows, padded past 2^31 positions or packed close to
    them.
    """
    shape = (MANY * 30_000,) if packed else (MANY, 40_000)
    rows = (meta(MANY + 1, dtype=torch.int32), None) if packed else (None, meta(*shape, dtype=torch.bool))
    return [meta(*shape) for _ in range(count)], rows


def launch_token_logprob(room, packed):
    logits, ids = logit_arguments()
    room.token_logprob(logits, ids, 0.7, None, 0.0, True)
    room.token_logprob(logits, ids, 1.0, meta(MANY), 30.0, False)


def launch_token_logprob_backward(room, packed):
    logits, ids = logit_arguments()
    statistics, grads = [meta(MANY) for _ in range(3)], [meta(MANY) for _ in range(2)]
    room.token_logprob_backward(logits, ids, *statistics, *grads, 0.7, None, 0.0, logits)
    room.token_logprob_backward(
        logits, ids, *statistics, None, grads[1], 1.0, meta(MANY), 30.0, meta(MANY, VOCABULARY)
    )


def launch_ppo_loss_from_logits(room, packed):
    logits, ids = logit_arguments()
    vectors = [meta(MANY) for _ in range(4)]
    room.ppo_loss_from_logits(logits, ids, *vectors, 0.2, 0.3, 3.0, 0.1, False, 0.01, 0.7, None, 0.0, logits)


def launch_gae(room, packed):
    tensors, rows = token_arguments(2, packed)
    room.gae(*tensors, *rows, 0.97, 0.9, False)


def launch_ppo_lag_advantage(room, packed):
    (logp, ref_logp, values, cost_values), rows = token_arguments(4, packed)
    room.ppo_lag_advantage(
        logp,
        ref_logp,
        meta(MANY),
        meta(MANY),
        values,
        cost_values,
        meta(),
        *rows,
        0.1,
        1.0,
        0.95,
        50.0,
        False,
    )


def launch_ppo_loss(room, packed):
    tensors, rows = token_arguments(5, packed)
    room.ppo_loss(
        *tensors, *rows, 0.2, 0.3, 3.0, 0.1, False, 0.01, True, *([meta()] * 3 if packed else [None] * 3)
    )


def launch_value_loss(room, packed):
    tensors, rows = token_arguments(3, packed)
    for critics in (1, 2):
        room.value_loss(
            *(torch.stack([x] * critics) for x in tensors), *rows, 0.2, False, meta() if packed else None
        )


def launch_linear_logprob(room, packed):
    hidden, weight, ids = meta(MANY, 64), meta(VOCABULARY, 64), meta(MANY, dtype=torch.int64)
    room.linear_logprob(
        hidden,
        weight,
        ids,
        None if packed else meta(VOCABULARY),
        0.7,
        None,
        30.0 if packed else 0.0,
        True,
        None,
        False,
    )


LAUNCHES = {
    "token_logprob": (launch_token_logprob, launch_token_logprob_backward),
    "ppo_loss_from_logits": (launch_ppo_loss_from_logits,),
    "linear_logprob": (launch_linear_logprob,),
    "gae": (launch_gae,),
    "ppo_lag_advantage": (launch_ppo_lag_advantage,),
    "ppo_loss": (launch_ppo_loss,),
    "value_loss": (launch_value_loss,),
}


class Recorder:
    """Takes a kernel's place: kernel[grid](...) notes (path, grid, arguments by name, keywords that the
    kernel lacks).
    """

    def __init__(self, path, kernel, seen):
        self.path, self.kernel, self.seen = path, kernel, seen

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        def launch(*arguments, **keywords):
            names = aot.jitted(self.kernel).arg_names
            given = {**dict(zip(names, arguments)), **{k: v for k, v in keywords.items() if k in names}}
            options = {k: v for k, v in keywords.items() if k not in names}
            self.seen.append((self.path, grid(given) if callable(grid) else grid, given, options))

        return launch


@pytest.fixture
def launches(monkeypatch):
    seen = []
    for entry in aot.TABLE:
        module, name = aot.resolve(entry.path)
        kernel = getattr(module, name)
        recorder = Recorder(entry.path, kernel, seen)
        for holder in [m for n, m in sys.modules.items() if n.startswith(aot.PACKAGE)]:
            for key in [key for key, value in vars(holder).items() if value is kernel]:
                monkeypatch.setattr(holder, key, recorder)
    return seen


def kind(value):
    """The type that a launch gives to an argument, as the table writes it."""
    if isinstance(value, torch.Tensor):
        names = {
            torch.float32: "fp32",
            torch.bfloat16: "bf16",
            torch.float16: "fp16",
            torch.float64: "fp64",
            torch.bool: "i1",
        }
        return "*" + names.get(value.dtype, f"i{8 * value.dtype.itemsize}")
    return "fp32" if isinstance(value, float) else "i64" if abs(int(value)) >= PAST else "i32"


def fits(variant, given, options):
    """Whether a launch is one that the table compiles (an integer past 2^31 may stand as i32 there)."""
    if any(given.get(k) is not v and given.get(k) != v for k, v in variant.constants.items()):
        return False
    if {k: v for k, v in options.items() if k in aot.OPTIONS} != variant.options:
        return False
    return all(
        kind(given[k]) == want or (kind(given[k]), want) == ("i64", "i32")
        for k, want in variant.signature.items()
        if want != "constexpr" and given[k] is not None
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "launch", [launch for room in LAUNCHES for launch in LAUNCHES[room]], ids=lambda f: f.__name__[7:]
)
def test_launches(launch, packed, launches):
    """Rows are on axis x of the grid, and what is launched is what tests/support/aot.py compiles."""
    room = next(room for room, functions in LAUNCHES.items() if launch in functions)
    if "triton" not in dispatch.OPS[room].order:
        pytest.skip(f"{room} has no Triton version")
    launch(import_module(f"{aot.PACKAGE}.{room}.triton_impl"), packed)
    assert launches
    for path, grid, given, options in launches:
        x, *others = grid
        assert 0 < x < PAST and all(0 < n <= 65_535 for n in others), f"{path}: grid {grid}"
        entries = [entry for entry in aot.TABLE if entry.path == path]
        assert all(given[name] < bound for entry in entries for name, bound in entry.below.items()), (
            f"{path}: {given}"
        )
        shown = {k: kind(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()} | options
        compiled = [variant for entry in entries for variant in aot.variants(entry, 80)]
        assert any(fits(variant, given, options) for variant in compiled), f"{path}: not compiled: {shown}"


BAD = """
  tt.func public @row_sum(%out: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("out"(#loc)), \
%stride: i32 loc("stride"(#loc))) {
    %c1024_i32 = arith.constant 1024 : i32
    %row = tt.get_program_id x : i32
    %block = tt.get_program_id y : i32
    %at = tt.make_range {end = 1024 : i32, start = 0 : i32} : tensor<1024xi32>
    %start = arith.muli %block, %c1024_i32 : i32
    %start_1 = tt.splat %start : i32 -> tensor<1024xi32>
    %at_1 = arith.addi %start_1, %at : tensor<1024xi32>
    @
    %row_X = tt.addptr %x, %offset : !tt.ptr<f32>, i64
    %row_X_1 = tt.splat %row_X : !tt.ptr<f32> -> tensor<1024x!tt.ptr<f32>>
    %row_X_2 = tt.addptr %row_X_1, %at_1 : tensor<1024x!tt.ptr<f32>>, tensor<1024xi32>
"""


@pytest.mark.parametrize(
    "lines, bad",
    [
        (
            (
                "%wide = arith.extsi %row : i32 to i64",
                "%by = arith.extsi %stride : i32 to i64",
                "%offset = arith.muli %wide, %by : i64",
            ),
            [],
        ),
        (
            ("%far = arith.muli %row, %stride : i32", "%offset = arith.extsi %far : i32 to i64"),
            ["%far = arith.muli %row, %stride : i32"],
        ),
        (
            (
                "%far = arith.muli %row, %c1024_i32 : i32",
                "%more = arith.addi %far, %c1024_i32 : i32",
                "%offset = arith.extsi %more : i32 to i64",
            ),
            ["%far = arith.muli %row, %c1024_i32 : i32"],
        ),
        (("%unused = arith.muli %row, %stride : i32", "%offset = arith.extsi %row : i32 to i64"), []),
    ],
    ids=["64 bits", "row * stride", "program * BLOCK", "no address"],
)
def test_narrow_offsets_are_found(lines, bad):
    """What tests/kernels/test_compile.py relies on: 32-bit products are found where they become part of an
    address.
    """
    text = BAD.replace("@\n", "\n    ".join(lines) + "\n")
    assert narrow_offsets(text) == bad
    assert narrow_offsets(text, dict(stride=1)) == (bad if "stride" not in str(bad) else [])
