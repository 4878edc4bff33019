"""Run by test_faults.py in each of several processes: one command line, with a fault where FAULT says.

FAULT is JSON: {"rank", "at": a key of `fault`, "save": which save (loss, step) of this process, from 1,
"share": of the bytes of the rank's optimiser shard}. The process kills itself there as `kill -9` would, or a
number becomes NaN, or it is told to stop.
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
    """At a share of the bytes of this rank's optimiser shard, in the save of that number."""
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
    """When this rank has written all of its own and the others wait to hear of it."""
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
    """When all shards are there and the rename that commits them is not made."""
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
    """This rank's loss of one backward is NaN."""
    from saferlhf_fast.runtime.engine import Engine

    real, count = Engine.backward, [0]

    def backward(self, loss):
        count[0] += 1
        real(self, loss * float("nan") if count[0] == number else loss)

    return mock.patch.object(Engine, "backward", backward)


def nan_in_a_score(kind, value, number):
    """One score of this rank's is not mask_invalid_scores, at that step."""
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
    """This rank is told to stop in the update of that step."""
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
    """Rank 0 writes the whole weights that a resumed run begins with."""
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
    os._exit(code)  # how gloo's threads end is not what is tested here
