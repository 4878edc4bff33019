"""Requests and answers: which fields there are, what is wrong with them, and OpenAI's 13 categories.

A category of OpenAI has the largest score among its counterparts in the moderator's label set. One without a
counterpart has the score 0, is never flagged, and is named in `unsupported_categories`.
"""

import json
import uuid
from typing import Any

from ...data.harm_taxonomy import COUNTERPARTS, OPENAI
from ...errors import UserError
from ..moderator import Verdict, checked_pairs

LETTERS = {
    "S": "sexual",
    "H": "hate",
    "V": "violence",
    "HR": "harassment",
    "SH": "self-harm",
    "S3": "sexual/minors",
    "H2": "hate/threatening",
    "V2": "violence/graphic",
}
"""Labels of OpenAI's data set as its API names them."""


class BadRequest(Exception):
    """A request that cannot be judged.

    Attributes:
        status: 400 or 422.
        message: What is wrong, without text of the request.
        param: The field; None where the whole body is meant.
        code: A word that programs can compare.
    """

    def __init__(self, status: int, message: str, param: str | None, code: str) -> None:
        """Makes the exception."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        BadRequest: It is no JSON (400), or no object (422).
    """
    try:
        value = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        message = f"body: expected UTF-8 text, got the byte 0x{body[error.start]:02x} at {error.start}"
        raise BadRequest(400, message, None, "invalid_json") from None
    except json.JSONDecodeError as error:
        message = f"body: expected JSON, got something else at character {error.pos} ({error.msg})"
        raise BadRequest(400, message, None, "invalid_json") from None
    except (ValueError, RecursionError) as error:
        message = f"body: expected JSON, got what cannot be read ({type(error).__name__})"
        raise BadRequest(400, message, None, "invalid_json") from None
    if not isinstance(value, dict):
        raise _invalid("body", f"expected an object, got {_kind(value)}", None)
    return value


def texts_of(fields: dict[str, Any], most: int) -> list[str]:
    """The texts of a request to /v1/moderations: one for each result.

    Args:
        fields: The request: `input` is a text, a list of texts, or a list of parts, which are one text.
        most: Most texts of a request.

    Raises:
        BadRequest: The first field that is wrong.
    """
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise _invalid("model", f"expected text, got {_kind(model)}")
    if "input" not in fields:
        raise _invalid("input", "expected a text, a list of texts or a list of parts, got nothing")
    value = fields["input"]
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise _invalid("input", f"expected a text, a list of texts or a list of parts, got {_kind(value)}")
    if not value:
        raise _invalid("input", "expected at least one text, got an empty list")
    if len(value) > most:
        raise _invalid("input", f"expected at most {most} texts, got {len(value)}")
    if isinstance(value[0], dict):
        return ["\n".join(_part(f"input[{i}]", item) for i, item in enumerate(value))]
    return [_text(f"input[{i}]", item) for i, item in enumerate(value)]


def pair_of(fields: dict[str, Any]) -> tuple[str, str]:
    """Prompt and response of a request to /moderate.

    Raises:
        BadRequest: The first field that is wrong.
    """
    for name in ("prompt", "response"):
        if name not in fields:
            raise _invalid(name, "expected text, got nothing")
    return _text("prompt", fields["prompt"]), _text("response", fields["response"])


def verdict_fields(verdict: Verdict, about: dict[str, str]) -> dict[str, Any]:
    """The answer of /moderate: the verdict, P(safe), and who judged."""
    return {"safe": 1.0 - verdict.unsafe, **verdict.as_dict(), **about}


def moderations(verdicts: list[Verdict], about: dict[str, str]) -> dict[str, Any]:
    """The answer of /v1/moderations.

    Args:
        verdicts: One for each text, in order.
        about: Model, label set and preset.
    """
    sources = openai_sources(about["label_set"], list(verdicts[0].categories) if verdicts else [])
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": about["model"],
        "results": [_result(verdict, sources, about) for verdict in verdicts],
    }


def openai_sources(label_set: str, categories: list[str]) -> dict[str, list[str]]:
    """{category of OpenAI: the moderator's categories that it is read from, maybe none}."""
    if label_set == "pku":
        table = COUNTERPARTS["pku", "openai"]
    elif label_set == "openai-letters":
        table = {letter: (name,) for letter, name in LETTERS.items()}
    else:
        table = {name: (name,) for name in OPENAI} if label_set == "openai" else {}
    return {key: [name for name in categories if key in table.get(name, ())] for key in OPENAI}


def _result(verdict: Verdict, sources: dict[str, list[str]], about: dict[str, str]) -> dict[str, Any]:
    flags = {key: any(verdict.flags[name] for name in names) for key, names in sources.items()}
    scores = {
        key: max((verdict.categories[name] for name in names), default=0.0) for key, names in sources.items()
    }
    return {
        "flagged": verdict.flagged or any(verdict.flags.values()),
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": {key: ["text"] if names else [] for key, names in sources.items()},
        "unsupported_categories": [key for key, names in sources.items() if not names],
        "moderator": verdict_fields(verdict, about),
    }


def _part(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        raise _invalid(name, f"expected a part (an object with type and text), got {_kind(value)}")
    if value.get("type") != "text":
        got = "image_url" if value.get("type") == "image_url" else "another"
        raise _invalid(f"{name}.type", f"expected text, which is all that this moderator reads, got {got}")
    if "text" not in value:
        raise _invalid(f"{name}.text", "expected text, got nothing")
    return _text(f"{name}.text", value["text"])


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _invalid(name, f"expected text, got {_kind(value)}")
    try:
        checked_pairs([""], [value])
    except UserError:
        raise _invalid(name, "expected Unicode text, got a lone surrogate") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _invalid(name: str, problem: str, param: str | None = "") -> BadRequest:
    return BadRequest(422, f"{name}: {problem}", name if param == "" else param, "invalid_value")
