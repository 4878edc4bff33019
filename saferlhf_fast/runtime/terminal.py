"""Output on terminals of any encoding: characters that it does not have are written in ASCII.

The standard library only, as the command line's help needs it.
"""

import codecs
from typing import Any

HANDLER = "saferlhf-readable"
"""The name of the error handler for Python's encoders."""

SPELLED = {
    **{"…": "...", "–": "-", "—": "-", "−": "-", "‑": "-", "×": "x", "·": "*", "•": "*", "±": "+-"},
    **{"²": "^2", "³": "^3", "½": "1/2", "ᵀ": "^T", "√": "sqrt", "∝": "~", "≈": "~", "∞": "infinity"},
    **{"≤": "<=", "≥": ">=", "≠": "!=", "→": "->", "←": "<-", "⏎": "\\n", "✓": "yes", "✗": "no"},
    **{"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\xa0": " "},
    **{"µ": "u", "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta"},
    **{"λ": "lambda", "μ": "mu", "ν": "nu", "π": "pi", "ρ": "rho", "σ": "sigma"},
    **{"Δ": "Delta", "Σ": "sum", "│": "|", "┃": "|", "─": "-", "━": "-", "═": "="},
}
"""Characters of this package's own texts; all others are written as escapes, such as \\xe9."""


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Returns (ASCII for the characters that cannot be encoded, where to go on), as codecs asks for."""
    assert isinstance(error, UnicodeEncodeError), f"only encoders use this handler, got {error!r}"
    characters = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters), (
        error.end
    )


def make_readable(*streams: Any) -> None:
    """Lets text streams write every character: in their encoding, or else in ASCII.

    Args:
        streams: Such as sys.stdout; what is no stream of an encoding stays as it is.
    """
    codecs.register_error(HANDLER, _readable)
    for stream in streams:
        if hasattr(stream, "reconfigure") and not getattr(stream, "closed", True):
            stream.reconfigure(errors=HANDLER)
