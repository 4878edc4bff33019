"""`info`: tells what is there and what is not; never raises."""

import importlib
import importlib.metadata
import sys
from types import SimpleNamespace

import pytest
import torch

from saferlhf_fast.commands import info
from saferlhf_fast.kernels import (
    dispatch,
    pointers,  # noqa: F401 - it takes native_module at its import, which must not be one of these tests' own
)


def test_it_names_versions_device_and_every_op():
    text = info.text()
    for part in (
        f"torch          {importlib.metadata.version('torch')}",
        "device: c",
        "_C: ",
        "deepspeed: ",
        "flash-",
    ):
        assert part in text
    assert [line.split()[0] for line in info.ops()] == list(dict.fromkeys(row.op for row in dispatch.table()))


def line_of(op):
    (line,) = (line for line in info.ops() if line.split()[0] == op)
    return " ".join(line.split())


@pytest.mark.parametrize(
    "built, chosen, others",
    [
        (True, "native first that can run (triton: triton is not installed)", "reference could run"),
        (
            False,
            "reference first that can run (triton: triton is not installed; native: saferlhf_fast._C: not "
            "built)",
            "",
        ),
    ],
)
def test_the_line_of_an_op_names_what_runs_and_why(built, chosen, others, monkeypatch):
    """On a CPU; the reason is the one that a call gets from `choose`."""
    monkeypatch.delenv("SAFERLHF_IMPL", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(dispatch._WHY_NOT, "triton", lambda op, device, dtype: "triton is not installed")
    monkeypatch.setattr(
        dispatch, "native_module", lambda: (SimpleNamespace(), "built") if built else (None, "not built")
    )
    assert line_of("gae") == "; ".join(filter(None, [f"gae {chosen}", others]))
    monkeypatch.setattr(dispatch, "_choose", dispatch._choose.__wrapped__)
    function, reason = dispatch.choose("gae", (torch.zeros(2),))
    name = "native" if built else "reference"
    assert (
        f"gae {reason.replace(f'{name}: ', f'{name} ', 1)}" == f"gae {chosen}"
        and function.__module__.endswith(name)
    )


def test_a_gpu_gets_its_own_line(monkeypatch):
    monkeypatch.delenv("SAFERLHF_IMPL", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(dispatch._WHY_NOT, "triton", lambda op, device, dtype: None)
    monkeypatch.setattr(dispatch, "native_module", lambda: (SimpleNamespace(cuda=True), "built"))
    assert line_of("ppo_loss") == (
        "ppo_loss triton first that can run; reference could run; "
        "native: the native version runs on the CPU, the tensors are on cuda"
    )
    assert line_of("gae") == "gae triton first that can run; reference and native could run"


def test_a_forced_implementation_is_the_reason_and_one_that_cannot_run_says_what_a_call_gets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(dispatch._WHY_NOT, "triton", lambda op, device, dtype: "triton is not installed")
    monkeypatch.setenv("SAFERLHF_IMPL", "reference")
    assert line_of("gae").startswith("gae reference asked for in SAFERLHF_IMPL; ")
    for forced, message in (
        ("triton", "implementation 'triton' cannot run here: triton is not installed"),
        ("quick", "SAFERLHF_IMPL=quick is not one of auto, reference, triton, native"),
    ):
        monkeypatch.setenv("SAFERLHF_IMPL", forced)
        assert line_of("gae").startswith(f"gae none, a call raises: {message}; ")


def test_a_broken_op_table_does_not_hide_the_rest(monkeypatch):
    monkeypatch.setattr(dispatch, "table", lambda: 1 / 0)
    assert info.ops() == ["  not available: ZeroDivisionError: division by zero"]
    assert "packages:" in info.text()


def test_a_missing_compiled_module_comes_with_its_reason_and_the_build_command(monkeypatch):
    monkeypatch.setattr(dispatch, "native_module", lambda: (None, "no compiler was found"))
    assert (
        info.compiled()
        == f"no compiler was found; to get it (needs a C++ compiler): {dispatch.BUILD_COMMAND}"
    )
    # of a checkout; test_install.py has the wheels' command
    assert "install -e ." in dispatch.BUILD_COMMAND
    for module, said in (
        (SimpleNamespace(cuda=True), "present, with CUDA"),
        (SimpleNamespace(cuda=False, cuda_note="no nvcc"), "present, for the CPU: no nvcc"),
    ):
        monkeypatch.setattr(dispatch, "native_module", lambda module=module: (module, ""))
        assert info.compiled() == said


def test_a_checkout_is_called_one():
    assert info.install().startswith("a checkout") and "install: a checkout" in info.text()


def test_packages_that_are_missing_or_broken_are_said_so(monkeypatch):
    def version(name):
        if name in ("deepspeed", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    def import_module(name):
        raise ImportError(f"no symbols in {name}")

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert info.versions()["wandb"] is None and info.versions()["torch"] == "1.2.3"
    assert "pip install 'saferlhf-fast[train]'" in info.deepspeed()
    monkeypatch.setattr(importlib, "import_module", import_module)
    assert "cannot be imported (no symbols in flash_attn)" in info.flash_attention()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert info.device().startswith("unknown: torch cannot be imported")
