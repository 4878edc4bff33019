"""Triton kernels, compiled for sm_80, sm_90 and sm_100 without a GPU: all compile, none spills, none is
forgotten, and offsets are 64 bits wide where they must be.

What is compiled stands in tests/support/aot.py. Whether a kernel is right is the business of
tests/kernels/test_<op>.py.
"""

import pytest
from aot import ARCHITECTURES, TABLE, by_architecture, compile_all, launched, paired, resolve, variants

# Shared memory that one program may ask for, bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def check(rows):
    """Fails with one line per cubin that is not as it should be."""
    spilling = {entry.path for entry in TABLE if entry.spill}
    problems = []
    for row in rows:
        if "error" in row:
            problems.append(f"does not compile: {row}")
        elif row["dynamic"] + row["shared"] > SHARED[row["arch"]]:
            problems.append(f"more shared memory than the architecture has: {row}")
        elif row["stack"] + row["local"] > 0 and row["kernel"] not in spilling:
            problems.append(f"spills: {row}")
        elif row["narrow"]:
            problems.append(f"an offset of 32 bits that may need 64: {row}")
    assert not problems, "\n".join(problems)
    assert {row["kernel"] for row in rows} == {entry.path for entry in TABLE}


@pytest.mark.timeout(600)
def test_kernels_compile(tmp_path):
    """Every kernel for sm_90, each pair of values of its constants and options; for sm_80 and sm_100 those
    whose configs depend on the architecture.
    """
    rows = compile_all([90, 80, 100], tmp_path, "--pairs")
    check(rows)
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)


def test_pairs_leave_no_value_out():
    """Each constant, option and dtype that the full product has is compiled in `test_kernels_compile`."""
    for entry in TABLE:
        for arch in ARCHITECTURES:
            full = list(variants(entry, arch))
            kept = paired(full) if full else []

            def values(found):
                chosen = [{**v.constants, **v.options, "dtype": v.dtype} for v in found]
                return {(name, str(value)) for values in chosen for name, value in values.items()}

            assert values(kept) == values(full)
    assert [entry.path.rpartition(".")[2] for entry in TABLE if by_architecture(entry)] == [
        "fused_kernel"
    ] * 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_combination(arch, tmp_path):
    """Every dtype, and integers that are no multiples of 16, on every architecture; it takes minutes."""
    check(compile_all([arch], tmp_path, "--all", timeout=3600))


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
