"""`info`: tells what is there and what is not; never raises."""

import importlib
import importlib.metadata
import sys
from types import SimpleNamespace

from saferlhf_fast.commands import info


def test_it_names_versions_device_and_every_op():
    text = info.text()
    for part in (f"torch          {importlib.metadata.version('torch')}", "device: c", "_C: ", "deepspeed: ", "flash-"):
        assert part in text
    for op in ("token_logprob", "gae", "ppo_lag_advantage", "ppo_loss", "value_loss"):
        assert any(op in line and "runs" in line for line in info.ops()), f"no implementation of {op} runs"


def test_a_forced_implementation_is_said(monkeypatch):
    monkeypatch.setenv("SAFERLHF_IMPL", "reference")
    assert "SAFERLHF_IMPL=reference" in info.ops()[-1]


def test_a_broken_op_table_does_not_hide_the_rest(monkeypatch):
    from saferlhf_fast.kernels import dispatch
    monkeypatch.setattr(dispatch, "table", lambda: 1 / 0)
    assert info.ops() == ["  not available: ZeroDivisionError: division by zero"]
    assert "packages:" in info.text()


def test_a_missing_compiled_module_comes_with_its_reason_and_the_build_command(monkeypatch):
    from saferlhf_fast.kernels import dispatch
    monkeypatch.setattr(dispatch, "native_module", lambda: (None, "no compiler was found"))
    assert info.compiled() == f"no compiler was found; to get it (needs a C++ compiler): {dispatch.BUILD_COMMAND}"
    assert "install -e ." in dispatch.BUILD_COMMAND         # of a checkout; test_install.py has the wheels' command
    for module, said in ((SimpleNamespace(cuda=True), "present, with CUDA"),
                         (SimpleNamespace(cuda=False, cuda_note="no nvcc"), "present, for the CPU: no nvcc")):
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
