"""Run by test_faults.py in each of several processes: one command line with a fault that FAULT describes.

FAULT is JSON: {"rank", "at": a key of the table in `fault`, "save": the number of the save (or loss, or step)
of this process, from 1, "share": the part of the rank's optimiser shard that is written before the fault}. At
that place the process kills itself as `kill -9` would, a number becomes NaN, or the process receives SIGTERM.
"""

import json
import os
import signal
import sys
from unittest import mock

import kit
import torch

FAULT = json.loads(os.environ.get("FAULT", "null"))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_within_a_file(share, number):
    """Kills the process after a share of the bytes of its optimiser shard, in the save of that number."""
    from saferlhf_fast.runtime.checkpoint import writer

    real, saves = writer.CheckpointWriter.save, [0]

    def save(self, state_dict, path):
        if "optim_states" not in path:
            return real(self, state_dict, path)
        saves[0] += 1
        if saves[0] < number:
            return real(self, state_dict, path)
        size, write = _size(state_dict), writer._Hashed.write

        def cut(file, data):
            left = int(share * size) - file.count
            if left <= len(data):
                write(file, bytes(data)[: max(0, left)])
                file.raw.flush()
                os.fsync(file.raw.fileno())
                die()
            return write(file, data)

        with mock.patch.object(writer._Hashed, "write", cut):
            return real(self, state_dict, path)

    return mock.patch.object(writer.CheckpointWriter, "save", save)


def _size(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def kill_after_the_files(number):
    """Kills the process when it has written all of its files and the other ranks wait for its result."""
    from saferlhf_fast.runtime.checkpoint.checkpointer import Checkpoints

    real, saves = Checkpoints._settle, [0]

    def settle(self):
        if self.files is not None:
            saves[0] += 1
            if saves[0] == number:
                die()
        real(self)

    return mock.patch.object(Checkpoints, "_settle", settle)


def kill_before_the_manifest(number):
    """Kills the process when all shards are written, before the rename that commits them."""
    from saferlhf_fast.runtime.checkpoint import manifest

    real, saves = os.replace, [0]

    def replace(a, b):
        if str(b).endswith(manifest.NAME):
            saves[0] += 1
            if saves[0] == number:
                die()
        real(a, b)

    return mock.patch.object(manifest.os, "replace", replace)


def nan_in_a_loss(number):
    """Makes the loss of one backward of this rank NaN."""
    from saferlhf_fast.runtime.engine import Engine

    real, count = Engine.backward, [0]

    def backward(self, loss):
        count[0] += 1
        real(self, loss * float("nan") if count[0] == number else loss)

    return mock.patch.object(Engine, "backward", backward)


def nan_in_a_score(kind, value, number):
    """Replaces one score of this rank by an invalid value, at that step."""
    import dataclasses

    from saferlhf_fast.rollout import scoring
    from saferlhf_fast.training import ppo_lag

    real, count = scoring.score_rollout, [0]

    def score_rollout(rollout, roles, cfg):
        scored, count[0] = real(rollout, roles, cfg), count[0] + 1
        if count[0] != number:
            return scored
        broken = (scored.reward_B if kind == "reward" else scored.costs[kind]).clone()
        broken[0] = float(value)
        return dataclasses.replace(
            scored, **{"reward_B": broken} if kind == "reward" else {"costs": {kind: broken}}
        )

    return mock.patch.object(ppo_lag, "score_rollout", score_rollout)


def sigterm(number):
    """Sends SIGTERM to this rank in that step."""
    from saferlhf_fast.rollout import scoring
    from saferlhf_fast.training import ppo_lag

    real, count = scoring.score_rollout, [0]

    def score_rollout(*arguments):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    return mock.patch.object(ppo_lag, "score_rollout", score_rollout)


def dump_the_weights(path):
    """Rank 0 writes the gathered weights with which a resumed run begins."""
    from safetensors.torch import save_file

    from saferlhf_fast.runtime.checkpoint.checkpointer import Checkpoints

    real = Checkpoints.resume

    def resume(self):
        step = real(self)
        state = self.models["model"].state_dict()
        if state is not None:
            save_file({name: value.contiguous() for name, value in state.items()}, path)
        return step

    return mock.patch.object(Checkpoints, "resume", resume)


def fault():
    if "DUMP" in os.environ:
        return dump_the_weights(os.environ["DUMP"])
    if FAULT is None or int(os.environ["RANK"]) != FAULT["rank"]:
        return mock.patch.dict(os.environ)
    at, number = FAULT["at"], FAULT.get("save", 1)
    return {
        "bytes": lambda: kill_within_a_file(FAULT.get("share", 0.5), number),
        "files": lambda: kill_after_the_files(number),
        "manifest": lambda: kill_before_the_manifest(number),
        "nan": lambda: nan_in_a_loss(number),
        "sigterm": lambda: sigterm(number),
        "score": lambda: nan_in_a_score(FAULT["kind"], FAULT["value"], number),
    }[at]()


if __name__ == "__main__":
    with fault(), mock.patch("saferlhf_fast.evaluation.report.write_report"):
        code = kit.main(*json.loads(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for gloo's threads, whose end is not tested here
