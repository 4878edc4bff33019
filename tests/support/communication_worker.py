"""Counts what one step of a stage sends: communication_worker.py OUT CASES under torchrun; CASES: JSON {name:
[word, …]}, words as for saferlhf-fast.

Every collective passes torch's dispatcher, whoever starts it; each counts under what was running (a forward,
a backward, a step, a rollout) with the bytes of its whole tensor: what is reduced, or what each rank has
after a gathering. Writes {name: {place: {collective: bytes}}} of the last step, from one optimiser step of
the first trained model to its next.
"""

import collections
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saferlhf_fast import cli
from saferlhf_fast.rollout.engines import hf_generate
from saferlhf_fast.runtime import engine

WHOLE = {
    "allreduce_": 0,
    "broadcast_": 0,
    "reduce_": 0,
    "_allgather_base_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "allgather_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "alltoall_base_": 0,
}
"""Collective -> which of its arguments is the whole tensor."""


class Counter(TorchDispatchMode):
    """Bytes of every collective, by place."""

    def __init__(self):
        super().__init__()
        self.places, self.bytes = ["between"], collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().split("::")[1]
            if name in WHOLE:
                size = sum(
                    t.numel() * t.element_size()
                    for t in torch.utils._pytree.tree_leaves(args[WHOLE[name]])
                    if isinstance(t, torch.Tensor)
                )
                self.bytes[self.places[-1], name.strip("_")] += size
            elif name not in ("barrier", "monitored_barrier_"):
                raise AssertionError(f"a collective that is not counted: {name}")
        return func(*args, **(kwargs or {}))

    def inside(self, cls, method, place):
        """Counts what a method does under a place; place: name, or function of the object."""
        real = getattr(cls, method)

        def counted(this, *args, **kwargs):
            self.places.append(place if isinstance(place, str) else place(this))
            self.bytes[self.places[-1], "times"] += 1
            try:
                return real(this, *args, **kwargs)
            finally:
                self.places.pop()

        setattr(cls, method, counted)


def called(model):
    """Policy or ScoreModel."""
    return type(model.module).__name__


def main(out, cases):
    counter, snapshots, found = Counter(), [], {}
    real_step = engine.Engine.step

    def step(this):
        made = real_step(this)
        snapshots.append((this, collections.Counter(counter.bytes)))
        return made

    engine.Engine.step = step
    counter.inside(engine.Engine, "step", lambda this: f"step {called(this)}")
    counter.inside(engine.Engine, "backward", lambda this: f"backward {called(this)}")
    counter.inside(
        engine.Engine,
        "__call__",
        lambda this: f"{'forward' if torch.is_grad_enabled() else 'asked'} {called(this)}",
    )
    counter.inside(engine.Frozen, "__call__", lambda this: f"frozen {called(this)}")
    counter.inside(hf_generate.Generate, "generate", "rollout")
    counter.inside(hf_generate.Call, "__call__", "token")
    for name, words in json.loads(Path(cases).read_text()).items():
        snapshots.clear()
        with counter, mock.patch("saferlhf_fast.evaluation.report.write_report"):
            code = cli.main(words)
        assert code == 0, name
        first = snapshots[0][0]
        *_, before, after = [made for which, made in snapshots if which is first]
        for (place, kind), size in (after - before).items():
            found.setdefault(name, {}).setdefault(place, {})[kind] = size
    if engine.rank() == 0:
        Path(out).write_text(json.dumps(found))
    engine.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
