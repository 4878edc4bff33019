"""Triton kernels, compiled for sm_80, sm_90 and sm_100 without a GPU: all compile, none spills, none is
forgotten, and offsets are 64 bits wide where they must be.

What is compiled stands in tests/support/aot.py. Whether a kernel is right is the business of
tests/kernels/test_<op>.py.
"""

import pytest
from aot import ARCHITECTURES, TABLE, compile_all, launched, resolve, variants

# Shared memory that one program may ask for, bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def check(arch, rows):
    """Fails with one line per cubin that is not as it should be."""
    spilling = {entry.path for entry in TABLE if entry.spill}
    problems = []
    for row in rows:
        if "error" in row:
            problems.append(f"does not compile: {row}")
        elif row["dynamic"] + row["shared"] > SHARED[arch]:
            problems.append(f"more shared memory than sm_{arch} has: {row}")
        elif row["stack"] + row["local"] > 0 and row["kernel"] not in spilling:
            problems.append(f"spills: {row}")
        elif row["narrow"]:
            problems.append(f"an offset of 32 bits that may need 64: {row}")
    assert not problems, "\n".join(problems)
    assert {row["kernel"] for row in rows} == {entry.path for entry in TABLE}


# sm_80, the oldest of the three, in make test-slow: a minute of one core each
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) if arch == 80 else arch for arch in ARCHITECTURES]
)
def test_kernels_compile(arch, tmp_path):
    check(arch, compile_all(arch, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_combination(arch, tmp_path):
    """Every dtype, and integers that are no multiples of 16, on every architecture."""
    check(arch, compile_all(arch, tmp_path, everything=True, timeout=3600))


def test_no_kernel_is_missing_from_the_table():
    assert {entry.path for entry in TABLE} == launched(), "tests/support/aot.py says how to add a kernel"


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.path)
def test_entries_fit_their_kernels(entry):
    """A name in an entry that the kernel does not have, or a constexpr without a value, would compile
    something else.
    """
    module, name = resolve(entry.path)
    kernel = getattr(module, name)
    while not hasattr(kernel, "arg_names"):
        kernel = kernel.fn
    assert set(entry.types) <= set(kernel.arg_names)
    for variant in variants(entry, 90):
        assert set(variant.constants) <= set(kernel.arg_names)
        needed = {p.name for p in getattr(kernel, "params", []) if p.is_constexpr}
        assert needed <= set(variant.constants), f"no value for {sorted(needed - set(variant.constants))}"
