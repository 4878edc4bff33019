"""Run by test_watch.py: the command line, with a fault in one rank's second rollout."""

import os
import signal
import sys
import time

from saferlhf_fast import cli
from saferlhf_fast.errors import UserError
from saferlhf_fast.rollout import sample

FAULT, RANKS = os.environ.get("FAULT", ""), os.environ.get("FAULTY", "").split(",")


def stuck():
    time.sleep(1000)


def faulty(sample, calls=[0]):  # noqa: B006 counts the calls
    def sampled(*args):
        calls[0] += 1
        if calls[0] == 2 and os.environ["RANK"] in RANKS:
            if FAULT == "raise":
                raise RuntimeError("no tokens\nleft")
            if FAULT == "refuse":
                raise UserError("data.json row 3: expected a prompt, got none")
            if FAULT == "hang":
                stuck()
            if FAULT == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if FAULT == "exit":
                raise SystemExit(143)
        return sample(*args)

    return sampled


if __name__ == "__main__":
    sample.sample = faulty(sample.sample)
    sys.exit(cli.main())
