"""Checks every function of a Library, replaces all of them, and records the places for `unpatch`."""

import sys
import threading
import warnings
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, NamedTuple

from . import sites
from .registry import Library, Replace
from .report import Refused, Report


class Replaced(NamedTuple):
    """One replaced function.

    Attributes:
        original: The library's.
        replacement: Our implementation.
        places: Where that was bound.
        dtype: One of `DTYPES`, that of its results.
    """

    original: Any
    replacement: Any
    places: list[sites.Site]
    dtype: str


DTYPES = ("float32", "input")


ACTIVE: dict[str, dict[str, Replaced]] = {}  # {library: {target: Replaced}}
# One patch or unpatch at a time: a second one could never undo what it finds half done.
LOCK = threading.RLock()


def patch(library: Library, force: bool, dtype: str = "float32") -> Report:
    """Replaces a library's functions.

    Args:
        library: Its table.
        force: Also for a version or a source that our implementation was never compared with.
        dtype: Of results of half-precision inputs: "float32", or "input" for the library's own dtype.

    Returns:
        What was replaced and what was left.

    Raises:
        Refused: A version, parameters or a source differ; then nothing has been replaced.
        ImportError: The library is not installed.
        ValueError: It is patched already with another dtype.
    """
    with LOCK:
        return _patch(library, force, dtype)


def _patch(library: Library, force: bool, dtype: str) -> Report:
    version = _version(library, force)
    active = ACTIVE.get(library.name, {})
    others = {replaced.dtype for replaced in active.values()} - {dtype}
    if others:
        raise ValueError(
            f"patch({library.name!r}): dtype: expected {others.pop()!r}, with which it is patched already, "
            f"got {dtype!r}; unpatch({library.name!r}) first"
        )
    left, originals = dict(library.leave), {}
    for entry in library.replace:
        reason = _missing(entry, library)
        if reason:
            left[entry.target] = reason
        elif entry.target not in active:
            original = _look_up(entry, library, force)
            if original is None:
                left[entry.target] = "it is not there in this version"
            else:
                originals[entry.target] = original
    fresh = library.name not in ACTIVE
    active = ACTIVE.setdefault(library.name, active)
    for entry in library.replace:
        if entry.target in originals:
            original = originals[entry.target]
            active[entry.target] = Replaced(original, _replacement(entry, original, dtype), [], dtype)
            sites.CALLS[entry.target] = 0
        if entry.target in active:
            _bind(active[entry.target], entry)
    report = Report(
        library.name,
        version,
        left=left,
        dtype=dtype,
        undo=(lambda: unpatch(library.name, active)) if fresh else None,
        standing=lambda: ACTIVE.get(library.name) is active,
    )
    for entry in library.replace:
        if entry.target in active:
            report.replaced[entry.target] = [site.label for site in active[entry.target].places]
            report.why[entry.target] = entry.why_with(dtype)
    return report


def unpatch(name: str, only: dict[str, Replaced] | None = None) -> list[str]:
    """Restores a library's functions.

    Args:
        name: The library.
        only: The replacements of one `patch`; those of a later one are left alone.

    Returns:
        Labels of the places that were restored.
    """
    with LOCK:
        if name not in ACTIVE or only not in (None, ACTIVE[name]):
            return []
        return [place for replaced in ACTIVE.pop(name).values() for place in _restore(replaced)]


def _restore(replaced: Replaced) -> list[str]:
    restored = []
    # Modules imported while our function was bound in the defining module have it by name.
    late = [site for site in sites.bindings(replaced.replacement) if site not in replaced.places]
    for site in [*replaced.places, *late]:
        if site.value is replaced.replacement:
            site.bind(replaced.original)
            restored.append(site.label)
        elif site.value is not replaced.original:
            warnings.warn(
                f"saferlhf-fast: {site.label} holds something else by now and is left as it is", stacklevel=4
            )
    return restored


def _version(library: Library, force: bool) -> str:
    """The installed version; ImportError without one, Refused for one that was never compared."""
    package = import_module_named(library)
    if library.distribution is None:
        return getattr(package, "__version__", "without a version")
    try:
        version = metadata.version(library.distribution)
    except metadata.PackageNotFoundError:
        version = getattr(package, "__version__", "unknown")
    if not force and not any(
        version == known or version.startswith(known + ".") for known in library.versions
    ):
        raise Refused(
            f"{library.name}: expected version {' or '.join(library.versions)}, got {version}; nothing was "
            f"replaced. patch({library.name!r}, force=True) replaces them anyway"
        )
    return version


def import_module_named(library: Library) -> ModuleType:
    """The library's package; ImportError with a sentence when it is not installed."""
    try:
        return import_module(library.name)
    except ModuleNotFoundError as error:
        if error.name != library.name:
            raise
        raise ImportError(f"patch({library.name!r}): {library.name} is not installed here") from error


def _missing(entry: Replace, library: Library) -> str | None:
    """Why a function cannot be replaced here, or None; imports its module unless `loaded` forbids it."""
    if entry.loaded and entry.module not in sys.modules:
        return f"{entry.module} is not imported yet: import it, then call patch({library.name!r}) again"
    try:
        import_module(entry.module)
    except ImportError as error:
        if not entry.optional:
            raise
        return f"its module cannot be imported here: {error}"
    return None


def _look_up(entry: Replace, library: Library, force: bool) -> Any:
    """The library's function, once its parameters and its source are those that we know.

    None where the function does not exist and `force` accepts that.
    """
    dotted = entry.target.replace(":", ".")
    try:
        holder, name = sites.resolve(entry.target)
    except AttributeError as error:
        if force:
            return None
        raise Refused(
            f"{library.name}: expected {dotted}, got none ({error}); nothing was replaced. "
            f"patch({library.name!r}, force=True) replaces the others"
        ) from error
    original = vars(holder)[name]
    if isinstance(original, (staticmethod, classmethod)):
        raise Refused(
            f"{library.name}: {entry.target}: expected a plain function, got {type(original).__name__}"
        )
    function = getattr(original, entry.signature_of) if entry.signature_of else original
    if force:
        return original
    parameters = sites.parameters(function)
    if parameters != entry.parameters:
        raise Refused(
            f"{library.name}: {dotted}: expected parameters {entry.parameters}, got {parameters}; nothing "
            f"was replaced. patch({library.name!r}, force=True) replaces them anyway"
        )
    if entry.digests and sites.digest(function) not in entry.digests:
        raise Refused(
            f"{library.name}: {dotted} is not the source that our function was compared with (digest "
            f"{sites.digest(function)}, expected {' or '.join(entry.digests)}); nothing was replaced. "
            f"patch({library.name!r}, force=True) replaces them anyway"
        )
    return original


def _replacement(entry: Replace, original: Any, dtype: str) -> Any:
    function = entry.make(original)
    if dtype == "input" and entry.dtype_of:
        function = sites.in_dtype_of(entry.dtype_of, function, original, entry.metrics)
    return function if entry.signature_of else sites.counted(entry.target, function, original)


def _bind(replaced: Replaced, entry: Replace) -> None:
    """Binds our function where it is defined, in registries, and in the modules that imported it."""
    holder, name = sites.resolve(entry.target)
    bound = [sites.Site(holder, name, entry.target.replace(":", "."))]
    for where, key in entry.entries:
        registry, attribute = sites.resolve(where)
        bound.append(sites.Site(vars(registry)[attribute], key, f"{where.replace(':', '.')}[{key!r}]"))
    bound += [site for site in sites.bindings(replaced.original) if site.label != bound[0].label]
    for site in bound:
        if site.value is replaced.original:
            site.bind(replaced.replacement)
            replaced.places.append(site)
