"""saferlhf-fast as a backend of other libraries: `patch("trl")` puts our ops in the place of their functions.

    from saferlhf_fast import integrations

    integrations.patch("verl")                       # says what it replaced, where, and what it left
    with integrations.patch("trl") as report:        # restores everything at the end
        trainer.train()
    report.calls                                     # {"trl.trainer.utils:selective_log_softmax": 96, …}
    integrations.patch("transformers", model)        # one model: model(input_ids, labels=…) without logits

Only what is faster, smaller or more correct is replaced, and only where it means the same:
docs/integrations.md has the measured table. A process that a library starts for itself (Ray workers) has to
be patched too.
"""

from importlib import import_module
from typing import Any

from . import replacing
from .report import Refused, Report

__all__ = ["LIBRARIES", "Refused", "Report", "patch", "patched", "unpatch"]

# Each has its table in a module of that name here; "transformers" patches one model instead.
LIBRARIES = ("trl", "verl", "openrlhf", "safe_rlhf", "align_anything", "transformers")


def patch(name: str, model: Any = None, *, force: bool = False, quiet: bool = False) -> Report:
    """Replaces a library's functions by ours, in every module that has imported them, and in its registries.

    name: "trl", "verl", "openrlhf", "safe_rlhf", "align_anything", or "transformers" with `model`, one
    instance of a Hugging Face causal LM. force: goes on for a version or signature that was never compared.
    quiet: prints nothing.

    Returns a Report; used as a context manager it restores everything at its end. Patching twice is harmless:
    the second call looks for what has been imported since, and its context leaves the first one's work alone.

    Raises ImportError when the library is not installed, Refused (a ValueError) for an unknown version or a
    function whose parameters have changed, by name; then nothing has been replaced. ValueError for an unknown
    name.
    """
    _known(name)
    if name == "transformers":
        if model is None:
            raise ValueError('patch("transformers", model): expected a causal language model, got None')
        report = import_module(f"{__name__}.transformers").patch_report(model, force=force)
    elif model is not None:
        raise ValueError(f"patch({name!r}) takes no model: it replaces the library's functions")
    else:
        report = replacing.patch(import_module(f"{__name__}.{name}").LIBRARY, force)
    if not quiet:
        report.show()
    return report


def unpatch(name: str | None = None, model: Any = None) -> list[str]:
    """Restores what `patch` replaced: of one library, of one model ("transformers", model), or of all
    libraries.

    Returns the places restored. A place that something else has written to since is left as it is, with a
    warning. Models are restored one by one: nothing here keeps them. Harmless when nothing is patched.
    """
    if name is None:
        return [place for each in list(replacing.ACTIVE) for place in replacing.unpatch(each)]
    _known(name)
    if name == "transformers":
        if model is None:
            raise ValueError('unpatch("transformers", model): expected the patched model, got None')
        return import_module(f"{__name__}.transformers").unpatch_places(model)
    return replacing.unpatch(name)


def patched() -> list[str]:
    """Names of the libraries that are patched in this process."""
    return sorted(replacing.ACTIVE)


def _known(name):
    if name not in LIBRARIES:
        raise ValueError(f"expected a library out of {', '.join(LIBRARIES)}, got {name!r}")
