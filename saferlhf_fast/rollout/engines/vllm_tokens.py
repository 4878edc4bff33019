"""What keeps vLLM from sampling rows of the head that have no token.

vLLM reads the number of logits from the model's configuration and samples all of them. A request can allow
ids, or lower the logits of others by at most 100, and either for at most 1024 ids. Written after the source
of vLLM 0.33.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...models.tokenizer import logit_count, spare_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_IDS = 1024
"""Most ids that a request can name."""
LOWEST_BIAS = -100.0
"""Lowest bias that a request can give: a probability is multiplied by e^-100."""


def request_fields(
    tokenizer: "PreTrainedTokenizerBase", lm: "PreTrainedModel", engine: str
) -> dict[str, Any]:
    """The fields of a request after which no row without a token is sampled.

    Args:
        tokenizer: The tokenizer of the policy.
        lm: The policy's causal LM.
        engine: The engine's name, for the message.

    Returns:
        allowed_token_ids, or logit_bias {id: bias}; nothing where every row has a token.

    Raises:
        UserError: A request cannot name so many ids.
    """
    spare_U = spare_rows(tokenizer, lm)
    if spare_U is None:
        return {}
    spare, size = spare_U.tolist(), logit_count(lm)
    if size - len(spare) <= MOST_IDS:
        return {"allowed_token_ids": sorted(set(range(size)).difference(spare))}
    if len(spare) <= MOST_IDS:
        return {"logit_bias": dict.fromkeys(spare, LOWEST_BIAS)}
    raise UserError(
        f"sampling.engine: {engine} can exclude at most {MOST_IDS} rows without a token, got {len(spare)} "
        f"({size} rows, {size - len(spare)} tokens); expected sampling.engine=generate or continuous, or a "
        f"model with fewer rows (resize_token_embeddings)"
    )


def refuse_spare(ids: Sequence[int], fields: dict[str, Any], engine: str) -> None:
    """Refuses a response with an id that the request excluded.

    Args:
        ids: Ids of the response.
        fields: As `request_fields` gave them.
        engine: The engine's name, for the message.

    Raises:
        UserError: An id has no token.
    """
    allowed, excluded = fields.get("allowed_token_ids"), fields.get("logit_bias", ())
    bad = next((i for i in ids if i in excluded or (allowed is not None and i not in allowed)), None)
    if bad is not None:
        raise UserError(
            f"sampling.engine: {engine} sampled id {bad}, for which the tokenizer has no token, though its "
            f"requests exclude it; expected a vLLM that follows allowed_token_ids and logit_bias"
        )
