"""saferlhf-fast as a backend of other libraries: `patch("trl")` puts our ops in the place of their functions.

    from saferlhf_fast import integrations

    integrations.patch("verl")                       # prints what it replaced, where, and what it left
    with integrations.patch("trl") as report:        # restores everything at the end
        trainer.train()
    report.calls                                     # {"trl.trainer.utils:selective_log_softmax": 96, …}
    integrations.patch("transformers", model)        # one model: model(input_ids, labels=…) without logits

A function is replaced only where our implementation is faster, smaller or more correct and means the same;
docs/integrations.md has the measured table. A process that a library starts itself (a Ray worker) has to be
patched too.
"""

from importlib import import_module
from typing import Any

from . import replacing
from .report import Refused, Report

__all__ = ["LIBRARIES", "Refused", "Report", "patch", "patched", "unpatch"]

# Each has its table in a module of this name in this package; "transformers" patches one model instead.
LIBRARIES = ("trl", "verl", "openrlhf", "safe_rlhf", "align_anything", "transformers")


def patch(
    name: str, model: Any = None, *, force: bool = False, quiet: bool = False, dtype: str = "float32"
) -> Report:
    """Replaces a library's functions, in every module that has imported them and in the library's registries.

    Patching twice is harmless: the second call also replaces what has been imported since, and its context
    does not undo the first call.

    Args:
        name: "trl", "verl", "openrlhf", "safe_rlhf", "align_anything" or "transformers".
        model: For "transformers" alone: the instance of a Hugging Face causal LM to patch.
        force: Also patches a version or a signature that our implementation was never compared with.
        quiet: Prints nothing; the report says the same.
        dtype: Of the results of bfloat16 and float16 inputs: "float32", or "input" for the dtype that the
            library's own function returns. They are computed in float32 in both cases. A patched model of
            transformers returns its loss in float32 with both, as transformers does.

    Returns:
        What was replaced and what was left; used as a context manager it restores everything at its end.

    Raises:
        ImportError: The library is not installed.
        Refused: Its version is unknown, or a function's parameters have changed (the message names it); then
            nothing has been replaced. It is a ValueError.
        ValueError: The name or the dtype is unknown, the library is patched with another dtype, or `model` is
            missing or does not belong there.
    """
    _require_known(name)
    if dtype not in replacing.DTYPES:
        raise ValueError(f"patch: dtype: expected {' or '.join(map(repr, replacing.DTYPES))}, got {dtype!r}")
    if name == "transformers":
        if model is None:
            raise ValueError('patch("transformers", model): expected a causal language model, got None')
        report = import_module(f"{__name__}.transformers").patch_report(model, force=force)
    elif model is not None:
        raise ValueError(f"patch({name!r}) takes no model: it replaces the library's functions")
    else:
        report = replacing.patch(import_module(f"{__name__}.{name}").LIBRARY, force, dtype)
    if not quiet:
        report.show()
    return report


def unpatch(name: str | None = None, model: Any = None) -> list[str]:
    """Restores what `patch` replaced; harmless when nothing is patched.

    A place to which something else has been bound since is left as it is, with a warning.

    Args:
        name: The library; None for all libraries. Patched models are not recorded here: each needs a call
            with "transformers" and the model.
        model: For "transformers" alone: the patched model.

    Returns:
        The places that were restored.

    Raises:
        ValueError: The name is unknown, or "transformers" comes without a model.
    """
    if name is None:
        return [place for each in list(replacing.ACTIVE) for place in replacing.unpatch(each)]
    _require_known(name)
    if name == "transformers":
        if model is None:
            raise ValueError('unpatch("transformers", model): expected the patched model, got None')
        return import_module(f"{__name__}.transformers").unpatch_places(model)
    return replacing.unpatch(name)


def patched() -> list[str]:
    """Names of the libraries that are patched in this process."""
    return sorted(replacing.ACTIVE)


def _require_known(name: str) -> None:
    if name not in LIBRARIES:
        raise ValueError(f"expected a library out of {', '.join(LIBRARIES)}, got {name!r}")
