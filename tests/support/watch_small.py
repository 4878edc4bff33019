"""Run by test_watch.py: ranks that run a collective, with a fault in some of them while the others wait.

watch_small.py FAULT RANKS TIMEOUT INTERVAL        FAULT: none raise refuse interrupt hang kill early
"""

import datetime
import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

from saferlhf_fast import cli
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import watchdog


def stuck():
    threading.Event().wait(1000)


def main(fault, ranks, timeout, interval):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(timeout) + 30))
    watchdog.begin(float(timeout), float(interval))
    dist.all_reduce(torch.ones(1))
    if os.environ["RANK"] in ranks.split(","):
        if fault == "raise":
            raise RuntimeError("no tokens\nleft")
        if fault == "refuse":
            raise UserError("row 3: expected a prompt, got none")
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "early":
            raise SystemExit(143)
        if fault == "hang":
            stuck()
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    return 0


if __name__ == "__main__":
    cli._dispatch = lambda args, words, argv: main(*argv)
    sys.exit(cli.main(sys.argv[1:]))
