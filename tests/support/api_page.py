"""The signatures of docs/api.md as the code has them: `python tests/support/api_page.py` writes them anew
into the page.

The page has a heading of its own for every public name, a block of Python with its signature, and words. A
name that is new gets a heading with "TODO", which test_api.py refuses until it has words; one that is gone
has to be taken out by hand.
"""

import ast
import enum
import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "api.md"
WIDTH = 120
# How annotations are written on the page; what comes first is replaced first.
SHORT = (
    (r"torch\.nn\.modules\.module\.Module", "nn.Module"),
    (r"pathlib(\._local)?\.Path", "Path"),
    (r"typing\.", ""),
    (r"\btorch\.Tensor\b", "Tensor"),
    (r"collections\.abc\.", ""),
    (r"torch\.distributed\.distributed_c10d\.", ""),
    (r"saferlhf_fast(\.\w+)*\.(?=\w)", ""),
)


def public():
    """{name on the page: object}: the package's names, then integrations'."""
    import saferlhf_fast
    from saferlhf_fast import integrations

    return {
        **{name: getattr(saferlhf_fast, name) for name in saferlhf_fast.__all__},
        **{f"integrations.{name}": getattr(integrations, name) for name in integrations.__all__},
    }


def imported_for_checkers():
    """Names that saferlhf_fast/__init__.py imports under TYPE_CHECKING."""
    tree = ast.parse((ROOT / "saferlhf_fast" / "__init__.py").read_text(encoding="utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    return {alias.asname for node in block.body for alias in node.names}


def signature(name, function, skip_self=False):
    """One function's signature, wrapped at commas."""
    found = inspect.signature(function)
    if skip_self:
        found = found.replace(parameters=list(found.parameters.values())[1:])
    empty, parts, stars = inspect.Parameter.empty, [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not stars:
            parts.append("*")
        stars = stars or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parts.append(_default(parameter, empty))
    answer = "" if found.return_annotation is empty else f" -> {_annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){answer}"
    if len(line) <= WIDTH:
        return line
    indent = " " * min(len(name) + 1, 24)
    whole = (
        ", ".join(part.replace(" ", "\0") for part in parts)
        + ")"
        + answer.replace(" ", "\0").replace("\0", " ", 1)
    )
    body = textwrap.wrap(whole, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    return (f"{name}(" + f"\n{indent}".join(body)).replace("\0", " ")


def _annotation(annotation):
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    for pattern, short in SHORT:
        text = re.sub(pattern, short, text)
    return text


def _default(parameter, empty):
    prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = prefix + parameter.name
    if parameter.annotation is not empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is empty:
        return text
    value = parameter.default
    shown = re.sub(
        r"^torch\.(?=float)", "torch.", repr(value.value if isinstance(value, enum.Enum) else value)
    )
    return f"{text} = {shown}" if parameter.annotation is not empty else f"{text}={shown}"


def block(name, thing):
    """The lines of Python under a name's heading."""
    if not callable(thing):
        return f"{name}: {type(thing).__name__}"
    if not inspect.isclass(thing):
        return signature(name, thing)
    if issubclass(thing, BaseException):
        return f"{name}({', '.join(base.__name__ for base in thing.__bases__)})"
    lines = [signature(name, thing).removesuffix(" -> None")]
    for member, value in vars(thing).items():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            lines.append(f".{member}" + signature("", value.fget, skip_self=True).removeprefix("()"))
        elif isinstance(value, staticmethod):
            lines.append(signature(f".{member}", value.__func__))
        elif inspect.isfunction(value):
            lines.append(signature(f".{member}", value, skip_self=True))
    return "\n".join(lines)


def entries(text):
    """{name: (block, words)} of a page."""
    found = {}
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        name, _, rest = part.partition("\n")
        rest = re.split(r"^## ", rest, flags=re.M)[0]
        match = re.search(r"```python\n(.*?)\n```\n(.*)", rest, re.S)
        found[name.strip("` ")] = (match[1], match[2].strip()) if match else ("", rest.strip())
    return found


def commands(text):
    """{command: its line} of the page's table of commands."""
    return dict(re.findall(r"^\| `saferlhf-fast ([\w -]+)` \| (.+) \|$", text, re.M))


def rewritten(text):
    """The page with today's signatures and lines of commands; new names and commands at the end of their
    part.
    """
    from saferlhf_fast import cli

    known = entries(text)
    for name, thing in public().items():
        if name in known:
            old = known[name][0]
            text = text.replace(
                f"### `{name}`\n\n```python\n{old}\n```",
                f"### `{name}`\n\n```python\n{block(name, thing)}\n```",
            )
        else:
            text = text.replace(
                "\n## Commands",
                f"\n### `{name}`\n\n```python\n{block(name, thing)}\n```\n\nTODO\n\n## Commands",
            )
    table = "\n".join(f"| `saferlhf-fast {name}` | {line} |" for name, line in cli.COMMANDS.items())
    return re.sub(r"(^\| `saferlhf-fast .*\n)+", lambda _: table + "\n", text, flags=re.M)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
