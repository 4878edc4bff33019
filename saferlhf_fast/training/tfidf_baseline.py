"""What a linear model on word counts reaches on the same pairs: a figure for score models to beat.

Features are TF-IDF (words and pairs of words) of the responses; the model is scikit-learn's logistic
regression, for pairs on the difference of the two responses' features, for safety signs on each response.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.examples import PairExample


def tfidf_right(
    examples: "Sequence[PairExample]",
    held_out: "Sequence[PairExample]",
    tokenizer: "PreTrainedTokenizerBase",
    kind: str,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Trains the baseline on the training pairs and tells where it is right on the held-out pairs.

    Args:
        examples: Training pairs; their first response is the better or the safer one.
        held_out: Held-out pairs.
        tokenizer: Turns the pairs' ids into text.
        kind: "reward" or "cost".

    Returns:
        (for each pair 1 or 0 [n], for each pair the share of its two signs that are right [n]). The second is
        None for rewards, and where the training pairs have signs of one kind alone.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    try:
        from scipy import sparse  # type: ignore[import-untyped]  # scipy has no types of its own
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("baseline=true: expected scikit-learn; pip install 'saferlhf-fast[eval]'") from error

    def texts(rows: "Sequence[PairExample]") -> tuple[list[str], list[str]]:
        decode: Any = tokenizer.decode
        return (
            [decode(e.first_ids[e.prompt_length :], skip_special_tokens=True) for e in rows],
            [decode(e.second_ids[e.prompt_length :], skip_special_tokens=True) for e in rows],
        )

    train_first, train_second = texts(examples)
    test_first, test_second = texts(held_out)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    words.fit(train_first + train_second)
    train_a, train_b = words.transform(train_first), words.transform(train_second)
    test_a, test_b = words.transform(test_first), words.transform(test_second)
    # Each pair comes in both orders, so that the classifier has no side to prefer.
    pair = LogisticRegression(max_iter=1000, fit_intercept=False)
    pair.fit(
        sparse.vstack([train_a - train_b, train_b - train_a]),
        np.r_[np.ones(len(examples)), np.zeros(len(examples))],
    )
    right = pair.predict(test_a - test_b).astype(float)
    if kind != "cost":
        return right, None
    labels = np.array([e.sign_first for e in examples] + [e.sign_second for e in examples])
    truth = np.array([e.sign_first for e in held_out] + [e.sign_second for e in held_out])
    if len(set(labels)) != 2:
        return right, None
    sign = LogisticRegression(max_iter=1000).fit(sparse.vstack([train_a, train_b]), labels)
    right_sign = sign.predict(sparse.vstack([test_a, test_b])) == truth
    return right, right_sign.reshape(2, -1).mean(0)
