"""Predictions for one H200, made before any measurement on a GPU, from bytes, operations and compiled code.

They are for the kernels of that time, so a row that a later change has made faster may be better than its
prediction. Figures are milliseconds (low, high), unless the unit says otherwise.
"""

LOGITS, LINEAR, LONG, SHORT = "8192x151936xbfloat16", "8192x4096x128256xbfloat16", "4096x2048", "256x1024"
# (op, shape, version or "" for all versions of this library): (field of a row, low, high)
MS = 1e-3
TABLE = {
    ("token_logprob + entropy forward", LOGITS, "triton"): ("seconds", 0.62 * MS, 0.72 * MS),
    ("token_logprob + entropy forward", LOGITS, "triton, threads first"): ("seconds", 0.60 * MS, 0.66 * MS),
    ("token_logprob, backward alone", LOGITS, "triton, 1 tiles a program"): ("seconds", 1.35 * MS, 1.6 * MS),
    ("ppo_loss_from_logits, the kernel alone", LOGITS, "triton"): ("seconds", 1.55 * MS, 1.75 * MS),
    ("ppo_loss_from_logits forward + backward", LOGITS, "triton"): ("seconds", 1.75 * MS, 2.1 * MS),
    ("ppo_loss_from_logits forward + backward, upstream 0.7", LOGITS, "triton"): (
        "seconds",
        2.9 * MS,
        3.3 * MS,
    ),
    ("scale by 1", LOGITS, "triton"): ("seconds", 0.10 * MS, 0.15 * MS),
    ("linear_logprob forward", LINEAR, "triton"): ("seconds", 13.0 * MS, 15.5 * MS),
    ("linear_logprob forward", LINEAR, "triton, chunks"): ("seconds", 12.2 * MS, 13.0 * MS),
    ("linear_logprob forward + backward", LINEAR, "triton"): ("seconds", 50 * MS, 55 * MS),
    ("linear_ppo_loss forward + backward", LINEAR, "triton"): ("seconds", 40 * MS, 46 * MS),
    ("linear_ppo_loss forward + backward", LINEAR, "triton, chunks of 2048"): ("seconds", 38 * MS, 39 * MS),
    ("linear_ppo_loss forward + backward", LINEAR, "verl linear_cross_entropy + loss"): (
        "seconds",
        69 * MS,
        124 * MS,
    ),
    ("ppo_lag_advantage", LONG, "triton"): ("seconds", 0.080 * MS, 0.120 * MS),
    ("ppo_lag_advantage", LONG, "native"): ("seconds", 0.080 * MS, 0.120 * MS),
    ("ppo_lag_advantage", SHORT, "triton"): ("call", 0.063 * MS, 0.070 * MS),
    ("gae", LONG, "triton"): ("seconds", 0.050 * MS, 0.075 * MS),
    ("gae", LONG, "native"): ("seconds", 0.050 * MS, 0.075 * MS),
}
# measured on another machine of this kind
CEILINGS = {"copy_gb_s": (4300, 4300), "bfloat16_tflop_s": (769, 798)}


def of(row):
    """Returns (field, low, high) of a row, or None."""
    return TABLE.get((row["op"], row["shape"], row["version"]))


def ratio(row):
    """Returns the measured value over the middle of the prediction, or None if there is no prediction."""
    prediction = of(row)
    if prediction is None or not row.get(prediction[0]):
        return None
    return row[prediction[0]] / ((prediction[1] + prediction[2]) / 2)
