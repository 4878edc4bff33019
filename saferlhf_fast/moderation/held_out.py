"""Evaluation rows that are also training rows."""

from collections.abc import Sequence

from ..data.moderation_examples import ModerationExample
from ..errors import UserError
from ..runtime import console


def _key(example: ModerationExample) -> tuple[str, str]:
    return _plain(example.prompt_text), _plain(example.response_text)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def without_overlap(
    examples: Sequence[ModerationExample], held_out: Sequence[ModerationExample], overlap: str
) -> list[ModerationExample]:
    """The evaluation examples that count.

    Rows are compared without regard to case and spaces. A prompt that occurs in training with another answer
    is named in a warning: its topic is known.

    Args:
        examples: Training examples.
        held_out: Evaluation examples.
        overlap: refuse, drop or keep, as in the settings.

    Raises:
        UserError: Rows overlap and are refused, or none is left.
    """
    rows = {_key(example) for example in examples}
    prompts = {prompt for prompt, _ in rows if prompt}
    seen = [_key(example) in rows for example in held_out]
    line = f"train.eval_data: {sum(seen)} of {len(held_out)} rows are also training rows"
    if any(seen) and overlap == "refuse":
        raise UserError(
            f"{line}; expected other rows, or overlap=drop to leave them out (overlap=keep uses them)"
        )
    if any(seen):
        console.warn(f"{line}; they are {'left out' if overlap == 'drop' else 'kept'}")
    kept = [example for example, known in zip(held_out, seen) if not (known and overlap == "drop")]
    if not kept:
        raise UserError(f"{line}; without them none is left to evaluate on")
    known_prompts = sum(_plain(example.prompt_text) in prompts for example in kept)
    if known_prompts:
        console.warn(
            f"train.eval_data: the prompts of {known_prompts} of {len(kept)} rows occur in training too"
        )
    return kept
