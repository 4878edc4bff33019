"""The work of `patch` and `unpatch` for a Library: check everything, then replace everything, and remember
each place.
"""

import sys
import threading
import warnings
from importlib import import_module, metadata

from . import sites
from .report import Refused, Report

ACTIVE = {}  # {library: {target: (original, replacement, [Site])}}
# one patch or unpatch at a time: what a second one finds half done it could never undo
LOCK = threading.RLock()


def patch(library, force):
    """-> Report. Nothing is replaced when anything is refused."""
    with LOCK:
        return _patch(library, force)


def _patch(library, force):
    version = _version(library, force)
    held = ACTIVE.get(library.name, {})
    left, found = dict(library.leave), {}
    for entry in library.replace:
        reason = _missing(entry, library)
        if reason:
            left[entry.target] = reason
        elif entry.target not in held:
            looked = _look(entry, library, force)
            if looked is None:
                left[entry.target] = "it is not there in this version"
            else:
                found[entry.target] = looked
    fresh = library.name not in ACTIVE
    held = ACTIVE.setdefault(library.name, held)
    for entry in library.replace:
        if entry.target in found:
            original = found[entry.target]
            held[entry.target] = (original, _made(entry, original), [])
            sites.CALLS[entry.target] = 0
        if entry.target in held:
            _bind(held[entry.target], entry)
    report = Report(
        library.name,
        version,
        left=left,
        undo=(lambda: unpatch(library.name, held)) if fresh else None,
        standing=lambda: ACTIVE.get(library.name) is held,
    )
    for entry in library.replace:
        if entry.target in held:
            report.replaced[entry.target] = [site.label for site in held[entry.target][2]]
            report.why[entry.target] = entry.why
    return report


def unpatch(name, only=None):
    """Restores a library's functions -> labels of the places. only: the record of one `patch`; a later one is
    left alone.
    """
    with LOCK:
        if name not in ACTIVE or only not in (None, ACTIVE[name]):
            return []
        return [place for record in ACTIVE.pop(name).values() for place in _restore(*record)]


def _restore(original, replacement, places):
    restored = []
    # Modules that were imported while ours stood in the defining module hold ours by name.
    late = [site for site in sites.bindings(replacement) if site not in places]
    for site in [*places, *late]:
        if site.value is replacement:
            site.bind(original)
            restored.append(site.label)
        elif site.value is not original:
            warnings.warn(
                f"saferlhf-fast: {site.label} holds something else by now and is left as it is", stacklevel=4
            )
    return restored


def _version(library, force):
    """The installed version. ImportError: not there. Refused: not one that was compared."""
    top = import_module_named(library)
    if library.distribution is None:
        return getattr(top, "__version__", "without a version")
    try:
        version = metadata.version(library.distribution)
    except metadata.PackageNotFoundError:
        version = getattr(top, "__version__", "unknown")
    if not force and not any(
        version == known or version.startswith(known + ".") for known in library.versions
    ):
        raise Refused(
            f"{library.name}: expected version {' or '.join(library.versions)}, got {version}; nothing was "
            f"replaced. "
            f"patch({library.name!r}, force=True) goes on"
        )
    return version


def import_module_named(library):
    """The library's package. ImportError with a sentence when it is not installed."""
    try:
        return import_module(library.name)
    except ModuleNotFoundError as error:
        if error.name != library.name:
            raise
        raise ImportError(f"patch({library.name!r}): {library.name} is not installed here") from error


def _missing(entry, library):
    """None, or why a function cannot be replaced here; imports its module where that is meant."""
    if entry.loaded and entry.module not in sys.modules:
        return f"{entry.module} is not imported yet: import it, then call patch({library.name!r}) again"
    try:
        import_module(entry.module)
    except ImportError as error:
        if not entry.optional:
            raise
        return f"its module cannot be imported here: {error}"
    return None


def _look(entry, library, force):
    """The library's function, its parameters and source as they were compared; None: gone, and force goes on
    without it.
    """
    try:
        holder, name = sites.resolve(entry.target)
    except AttributeError as error:
        if force:
            return None
        raise Refused(
            f"{library.name}: expected {entry.target.replace(':', '.')}, got none ({error}); nothing was "
            f"replaced. "
            f"patch({library.name!r}, force=True) goes on without it"
        ) from error
    original = vars(holder)[name]
    if isinstance(original, (staticmethod, classmethod)):
        raise Refused(
            f"{library.name}: {entry.target}: expected a plain function, got {type(original).__name__}"
        )
    function = getattr(original, entry.signature_of) if entry.signature_of else original
    if force:
        return original
    got = sites.parameters(function)
    if got != entry.parameters:
        raise Refused(
            f"{library.name}: {entry.target.replace(':', '.')}: expected parameters {entry.parameters}, got "
            f"{got}; "
            f"nothing was replaced. patch({library.name!r}, force=True) goes on"
        )
    if entry.digests and sites.digest(function) not in entry.digests:
        raise Refused(
            f"{library.name}: {entry.target.replace(':', '.')} is not the source that ours was compared with "
            f"(digest "
            f"{sites.digest(function)}, expected {' or '.join(entry.digests)}); nothing was replaced. "
            f"patch({library.name!r}, force=True) goes on"
        )
    return original


def _made(entry, original):
    made = entry.make(original)
    return made if entry.signature_of else sites.counted(entry.target, made, original)


def _bind(record, entry):
    """Puts our version at every place that holds the library's: where it is defined, in registries, in other
    modules.
    """
    original, replacement, places = record
    holder, name = sites.resolve(entry.target)
    wanted = [sites.Site(holder, name, entry.target.replace(":", "."))]
    for where, key in entry.entries:
        registry, attribute = sites.resolve(where)
        wanted.append(sites.Site(vars(registry)[attribute], key, f"{where.replace(':', '.')}[{key!r}]"))
    wanted += [site for site in sites.bindings(original) if site.label != wanted[0].label]
    for site in wanted:
        if site.value is original:
            site.bind(replacement)
            places.append(site)
