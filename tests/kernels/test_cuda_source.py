"""csrc/*.cu without a GPU: the kernels run on the CPU (tests/kernels/cuda_on_cpu) against the references, and
nvcc compiles them.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import naive
import pytest
import torch
from tolerance import assert_near

from saferlhf_fast.kernels import dispatch, pointers
from saferlhf_fast.kernels.gae import native as gae_native
from saferlhf_fast.kernels.gae import reference as gae_reference
from saferlhf_fast.kernels.ppo_lag_advantage import native as ppo_native
from saferlhf_fast.kernels.ppo_lag_advantage import reference as ppo_reference

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
PARTIALS = 12 * 2048  # csrc/ppo_lag_advantage.h
SCALARS = dict(kl_coeff=0.1, gamma=0.99, lam=0.95, clip_score=0.7)
# Rows of these lengths take a warp each (mean up to 128 tokens) or a block of so many threads.
LENGTHS = {
    "warp": [5, 0, 127, 1, 200, 63],
    "64": [507, 63, 252, 0, 300],
    "128": [1030, 0, 2500, 700, 1],
    "256": [2500, 3000],
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The launchers of csrc/*.cu, compiled for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the emulation of CUDA needs one")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "ops.so"
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-shared",
            "-U_FORTIFY_SOURCE",
            "-fno-strict-aliasing",
            "-w",
            f"-I{ROOT / 'tests/kernels/cuda_on_cpu'}",
            f"-I{ROOT / 'csrc'}",
            ROOT / "tests/kernels/cuda_on_cpu/ops.cpp",
            "-x",
            "c++",
            *SOURCES,
            "-o",
            library,
        ],
        check=True,
        timeout=280,
    )
    return ctypes.CDLL(str(library))


def call(function, *arguments):
    """Addresses for tensors, C numbers for the rest; fails with what the launcher says."""
    kinds = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}
    function.restype = ctypes.c_char_p
    error = function(
        *[
            a
            if isinstance(a, ctypes.c_void_p)
            else ctypes.c_void_p(pointers.address(a))
            if a is None or isinstance(a, torch.Tensor)
            else kinds[type(a)](a)
            for a in arguments
        ]
    )
    assert error is None, error.decode()


def rows_of(cu_seqlens, mask, tokens):
    if cu_seqlens is not None:
        return cu_seqlens, None, tokens, len(cu_seqlens) - 1, 0
    return None, mask, tokens, mask.shape[0], mask.shape[1]


def gae(library, rewards, values, cu_seqlens, mask, gamma, lam, carry):
    out = [torch.full_like(rewards, -77.0) for _ in range(2)]
    call(
        library.gae,
        *out,
        rewards,
        values,
        *rows_of(cu_seqlens, mask, rewards.numel()),
        pointers.DTYPE_TAG[rewards.dtype],
        gamma,
        lam,
        carry,
    )
    return out


def ppo(
    library,
    logp,
    ref_logp,
    reward,
    cost,
    reward_values,
    cost_values,
    multiplier,
    cu_seqlens,
    mask,
    kl_coeff,
    gamma,
    lam,
    clip_score,
    carry,
):
    out = [torch.full_like(logp, -77.0) for _ in range(3)]
    statistics, counter = torch.full((12,), -77.0, dtype=logp.dtype), torch.zeros(1, dtype=torch.int32)
    partials = torch.full((PARTIALS,), float("nan"), dtype=torch.float64)
    call(
        library.ppo_lag_advantage,
        *out[:2],
        None if cost is None else out[2],
        statistics,
        logp,
        ref_logp,
        reward,
        cost,
        reward_values,
        cost_values,
        multiplier,
        *rows_of(cu_seqlens, mask, logp.numel()),
        pointers.DTYPE_TAG[logp.dtype],
        kl_coeff,
        gamma,
        lam,
        clip_score,
        carry,
        partials,
        counter,
    )
    assert counter.item() == 0
    return out[0], out[1], out[2] if cost is not None else out[2][:0].reshape(-1), statistics


def double(tensors):
    return [
        tensor.double() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor
        for tensor in tensors
    ]


def holes(shape, seed=3, share=0.3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > share


def layouts(batch, poison=float("nan")):
    """(name, a function from packed tokens to tensors of the layout, cu_seqlens, mask)."""
    tail = torch.full((5,), poison)
    rest = batch.mask & holes(batch.mask.shape)
    return [
        ("packed", lambda x: x, batch.cu_seqlens, None),
        ("packed with a tail", lambda x: torch.cat([x, tail.to(x.dtype)]), batch.cu_seqlens, None),
        ("padded", lambda x: batch.padded(x, poison), None, batch.mask),
        ("holes", lambda x: torch.where(rest, batch.padded(x, poison), poison), None, rest),
    ]


def shifted(tensor):
    """The same values one element past a 16-byte boundary."""
    room = torch.empty(tensor.numel() + 4, dtype=tensor.dtype)
    offset = 1 + (-room.data_ptr() // tensor.element_size()) % (16 // tensor.element_size())
    there = room[offset : offset + tensor.numel()].view(tensor.shape)
    return there.copy_(tensor)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("carry", [False, True])
def test_gae(emulated, dtype, lengths, carry):
    batch = naive.Ragged(lengths, seed=len(lengths))
    packed = batch.tokens(dtype), batch.tokens(dtype)
    for name, arrange, cu_seqlens, mask in layouts(batch):
        inputs = [arrange(tensor) for tensor in packed]
        rest = (cu_seqlens, mask, 0.97, 0.9, carry)
        got = gae(emulated, *inputs, *rest)
        for ours, exact in zip(got, gae_reference.gae(*double(inputs), *rest)):
            assert_near(ours, exact, name)
        elsewhere = gae(emulated, *map(shifted, inputs), *rest)
        assert all(torch.equal(a, b) for a, b in zip(got, elsewhere)), f"{name}: alignment changes bits"


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("carry, with_cost", [(False, True), (True, True), (False, False)])
def test_ppo_lag_advantage(emulated, dtype, lengths, carry, with_cost):
    batch = naive.Ragged(lengths, seed=len(lengths))
    names = ("logp", "ref_logp", "reward_values", "cost_values")
    packed = {name: batch.tokens(dtype) for name in names}
    scores = batch.scores(dtype), batch.scores(dtype)
    multiplier = torch.tensor(1.75, dtype=dtype)
    for name, arrange, cu_seqlens, mask in layouts(batch):
        logp, ref_logp, reward_values, cost_values = [arrange(packed[name]) for name in names]
        costs = (scores[1], cost_values, multiplier) if with_cost else (None, None, None)
        inputs = (logp, ref_logp, scores[0], costs[0], reward_values, costs[1], costs[2], cu_seqlens, mask)
        got = ppo(emulated, *inputs, **SCALARS, carry=carry)
        for ours, exact in zip(got, ppo_reference.ppo_lag_advantage(*double(inputs), **SCALARS, carry=carry)):
            assert_near(ours, exact, name)
        emulated.set_order(1)
        backwards = ppo(emulated, *inputs, **SCALARS, carry=carry)
        emulated.set_order(0)
        assert all(torch.equal(a, b) for a, b in zip(got, backwards)), (
            f"{name}: the order of blocks or warps changes bits"
        )


@pytest.mark.parametrize(
    "rows",
    [
        dict(cu_seqlens=torch.zeros(1, dtype=torch.int32)),
        dict(cu_seqlens=torch.zeros(4, dtype=torch.int32)),
        dict(mask=torch.zeros(3, 9, dtype=torch.bool)),
        dict(mask=torch.zeros(3, 1300, dtype=torch.bool)),
    ],
)
def test_nothing_valid(emulated, rows):
    rows = {"cu_seqlens": None, "mask": None} | rows
    tokens = torch.full((0,) if rows["mask"] is None else rows["mask"].shape, torch.nan)
    count = len(rows["cu_seqlens"]) - 1 if rows["mask"] is None else 3
    scores = torch.full((count,), torch.nan)
    *outputs, statistics = ppo(
        emulated,
        tokens,
        tokens,
        scores,
        scores,
        tokens,
        tokens,
        torch.ones(()),
        **rows,
        **SCALARS,
        carry=False,
    )
    assert (statistics == 0).all()
    assert all(
        (tensor == 0).all()
        for tensor in (*outputs, *gae(emulated, tokens, tokens, **rows, gamma=1.0, lam=1.0, carry=True))
    )


@pytest.mark.numeric
def test_a_long_row_and_many_rows(emulated):
    ones = torch.ones(131_072)
    one_row = torch.tensor([0, len(ones)], dtype=torch.int32)
    assert gae(emulated, ones, 0 * ones, one_row, None, 1.0, 1.0, False)[0].equal(
        ones.flip(0).cumsum(0).flip(0)
    )
    # lam = 0.9995: far tokens count, by a power of a decay that float32 does not hold. Sums near 0 are of
    # terms as large as those of the largest sum, so all are held to that; the numbers drawn differ from one
    # instruction set to another.
    rewards = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    rest = (torch.tensor([0, 9000], dtype=torch.int32), None, 1.0, 0.9995, False)
    exact = gae_reference.gae(rewards.double(), rewards.double(), *rest)[0]
    assert_near(
        gae(emulated, rewards, rewards, *rest)[0] / exact.abs().max().float(), exact / exact.abs().max()
    )
    lengths = torch.zeros(70_000, dtype=torch.int64)
    lengths[[0, 1, 65_534, 65_535, 65_536, 69_999]] = torch.tensor([3, 5, 1, 7, 2, 6])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    tokens = [torch.randn(24, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    scores = torch.randn(70_000, generator=torch.Generator().manual_seed(9))
    inputs = (*tokens[:2], scores, -scores, *tokens[2:], torch.tensor(0.5), offsets, None)
    got = ppo(emulated, *inputs, **SCALARS, carry=False)
    for ours, exact in zip(got, ppo_reference.ppo_lag_advantage(*double(inputs), **SCALARS, carry=False)):
        assert_near(ours, exact)


@pytest.mark.numeric
def test_native_py_hands_over_what_the_launchers_take(emulated, monkeypatch):
    """The branch for GPU tensors, with the emulation in the place of _C and CPU tensors in theirs."""

    def launcher(function):
        def launch(*arguments):
            assert arguments[-1] == 1234  # the stream
            call(
                function,
                *[ctypes.c_void_p(a) if type(a) is int and a > 1 << 32 else a for a in arguments[:-1]],
            )

        return launch

    module = SimpleNamespace(
        cuda=True,
        partials=PARTIALS,
        gae_cuda=launcher(emulated.gae),
        ppo_lag_advantage_cuda=launcher(emulated.ppo_lag_advantage),
    )
    for name, value in dict(
        module=lambda: module, on=lambda device: nullcontext(), stream=lambda device: 1234
    ).items():
        monkeypatch.setattr(pointers, name, value)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    batch = naive.Ragged([40, 3, 0, 25])
    for name, arrange, cu_seqlens, mask in layouts(batch):
        logp, ref_logp, values, cost_values = [arrange(batch.tokens()) for _ in range(4)]
        rest = (cu_seqlens, mask, 0.97, 0.9, True)
        for ours, exact in zip(gae_native.gae(logp, values, *rest), gae_reference.gae(logp, values, *rest)):
            assert_near(ours, exact, name)
        for scores in ((batch.scores(), cost_values, torch.tensor(0.5)), (None, None, None)):
            inputs = (logp, ref_logp, batch.scores(), scores[0], values, *scores[1:], cu_seqlens, mask)
            exact = ppo_reference.ppo_lag_advantage(*inputs, **SCALARS, carry=False)
            for ours, theirs in zip(ppo_native.ppo_lag_advantage(*inputs, **SCALARS, carry=False), exact):
                assert_near(ours, theirs, name)


def test_the_dispatcher_takes_it_for_tensors_on_a_gpu(monkeypatch):
    for cuda, reason in ((True, None), (False, "saferlhf_fast._C was built without CUDA: no nvcc")):
        module = SimpleNamespace(cuda=cuda, cuda_note="no nvcc")
        monkeypatch.setattr(dispatch, "native_module", lambda module=module: (module, "built"))
        for op in (name for name, op in dispatch.OPS.items() if op.native_cuda):
            assert dispatch._native_reason(op, "cuda", torch.float32) == reason
            assert dispatch._native_reason(op, "cuda", torch.float64) == reason
        assert "runs on the CPU" in dispatch._native_reason("value_loss", "cuda", torch.float32)


def test_the_emulation_notices_threads_that_wait_for_nobody(emulated):
    out = torch.zeros(64, dtype=torch.int32)
    for which in (0, 1):
        with pytest.raises(AssertionError, match="threads wait for others"):
            call(emulated.broken, which, out)


def test_a_build_that_fails_is_tried_again_without_cuda(monkeypatch, tmp_path):
    """Whatever nvcc does wrong, the CPU part is built, and the module says why there is no CUDA."""
    pytest.importorskip("pybind11")
    monkeypatch.setattr("setuptools.setup", lambda **settings: None)
    specification = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    tries = []

    def run_cmake(cmake, settings, target):
        tries.append(settings[-1])
        if len(tries) == 1:
            raise RuntimeError('nvcc fatal: "sm_999"; is odd')

    monkeypatch.setattr(module, "run_cmake", run_cmake)
    monkeypatch.setattr(module, "tool", lambda name: name)
    module.build_native(tmp_path / "_C.so")
    assert len(tries) == 2 and tries[1].startswith(
        "-DSAFERLHF_WITHOUT_CUDA=the build with it failed: nvcc fatal"
    )
    assert not set(tries[1]) & set('";')  # would end the string or the list that CMake makes of it


@pytest.mark.parametrize(
    "setting, variable, expected",
    [
        ("", "", "80-real;90-real;100"),
        ("", "90", ""),
        ("-DCMAKE_CUDA_ARCHITECTURES=90", "", "90"),
        ("-DCMAKE_CUDA_ARCHITECTURES=90", "80", "90"),
    ],
)
def test_the_architectures_can_be_chosen(setting, variable, expected, tmp_path):
    """What CMakeLists.txt leaves for enable_language, which takes CUDAARCHS only where nothing is set."""
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    text = (ROOT / "CMakeLists.txt").read_text()
    block = re.search(
        r"^( *)if\(NOT CMAKE_CUDA_ARCHITECTURES.*?^\1endif\(\)$", text, re.MULTILINE | re.DOTALL
    )
    assert block.end() < text.index("enable_language(CUDA)")
    script = tmp_path / "block.cmake"
    script.write_text(f'set(version 13.0)\n{block[0]}\nmessage("<${{CMAKE_CUDA_ARCHITECTURES}}>")\n')
    result = subprocess.run(
        [cmake, *setting.split(), "-P", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "CUDAARCHS": variable},
    )
    assert result.stderr.strip() == f"<{expected}>"


@pytest.mark.parametrize(
    "architectures",
    [("sm_90",), pytest.param(("sm_80", "sm_90", "sm_100"), marks=pytest.mark.slow)],
    ids="-".join,
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_it_without_spills(source, architectures, tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc")
    known = subprocess.run(
        [compiler, "--list-gpu-code"], capture_output=True, text=True, timeout=60
    ).stdout.split()
    targets = [name for name in architectures if name in known]
    result = subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O3",
            "--threads",
            "2",
            "-c",
            "-Xptxas",
            "-v",
            source,
            "-o",
            tmp_path / "out.o",
            *[f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in targets],
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr
    )
    assert len(spills) >= 4 * len(targets) and all(found == ("0", "0", "0") for found in spills), (
        result.stderr
    )
