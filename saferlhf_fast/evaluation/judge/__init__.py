"""An LLM as a judge of pairs of answers: both orders, verdicts that are never guessed, a limit on spending.

    protocol       what a judge is asked, and how its verdict is read
    endpoint       one request with retries, to any endpoint of OpenAI's chat completions
    spending       limits on requests, tokens and money, reserved before each call
    verdict_store  every verdict in a SQLite file, written before the next question is asked
    compare        pairs of answers in, judged pairs out
    summary        win rates, consistency, share of the first position, missing verdicts
    calibration    the command `evaluate judge-calibration`

Nothing here imports torch.
"""
