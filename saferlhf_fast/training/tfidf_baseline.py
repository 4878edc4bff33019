"""What a linear model on word counts makes of the same pairs: a figure for score models to beat.

TF-IDF (words and pairs of words) of the responses and logistic regression, by scikit-learn: for pairs on the
difference of the two responses' features, for safety signs on each response.
"""

import numpy as np

from ..errors import UserError


def tfidf_accuracy(examples, held_out, tokenizer, kind):
    """-> {"baseline/accuracy", and for costs "baseline/accuracy_sign"} on the held-out PairExamples.

    Trained on the training pairs alone. kind: reward or cost.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("baseline=true: expected scikit-learn; pip install 'saferlhf-fast[eval]'") from error

    def texts(rows):
        decode = tokenizer.decode
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
    # Each pair in both orders, so that the classifier has no side to prefer.
    from scipy.sparse import vstack

    pair = LogisticRegression(max_iter=1000, fit_intercept=False)
    pair.fit(
        vstack([train_a - train_b, train_b - train_a]), np.r_[np.ones(len(examples)), np.zeros(len(examples))]
    )
    out = {"baseline/accuracy": float(pair.predict(test_a - test_b).mean())}
    if kind == "cost":
        labels = np.array([e.sign_first for e in examples] + [e.sign_second for e in examples])
        truth = np.array([e.sign_first for e in held_out] + [e.sign_second for e in held_out])
        if len(set(labels)) == 2:
            sign = LogisticRegression(max_iter=1000).fit(vstack([train_a, train_b]), labels)
            out["baseline/accuracy_sign"] = float((sign.predict(vstack([test_a, test_b])) == truth).mean())
    return out
