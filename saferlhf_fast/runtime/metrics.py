"""Where a run's numbers go: metrics.jsonl always; TensorBoard, Weights & Biases and trackio by name.

metrics.jsonl has one JSON object a line, {"step", "time" (seconds since the run began), name: number, …},
written out at once. It is valid JSON whatever happens: NaN and inf become null, and `nonfinite` lists their
names. Only rank 0 writes. TensorBoard's files lie in <folder>/tensorboard.

Names are those of the reference implementation (PKU-Alignment/safe-rlhf), so that runs of both can be laid
over each other. Means are over sequences; `*_with_kl_penalty` and `kl_divergence` are sums over a response's
tokens; values, advantages and returns are means over a response's tokens; lengths are in tokens. Ours, which
it does not have: eval/loss, */grad_norm, train/clip_fraction, train/approx_kl, train/tokens,
train/unsafe_share, train/engine_gap_mean and _max (|log π_trainer − log π_engine| of a token, nats),
train/engine_gap_share (of tokens whose probabilities differ by more than 1 %), train/importance_weight
(mean), train/staleness (PPO steps), eval/kl, eval/length, eval/unsafe_share, eval/threshold, gold/*.
"""

import importlib
import json
import math
import os
import time
from pathlib import Path

from ..config.checks import check_trackers


class Metrics:
    """Writes the numbers of one run. On other ranks than 0 every method does nothing."""

    def __init__(self, folder, logging_cfg, run_config, name):
        """folder: of the run · logging_cfg: a Logging (trackers, project) · run_config: the settings, as a
        dict, for the trackers · name: of the stage.
        """
        # on every rank, or the others would wait for rank 0 until a timeout
        check_trackers(logging_cfg.trackers)
        self.file, self.trackers, self.open_trackers = None, [], None
        if int(os.environ.get("RANK", "0")) != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.begun, self.step = time.monotonic(), 0
        self.open_trackers = lambda after: [
            _OPEN[t](folder, logging_cfg.project, run_config, name, after)
            for t in dict.fromkeys(logging_cfg.trackers)
        ]
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")

    def log(self, step, values):
        """Writes one line. values: {name: number or 0-d tensor}; tensors are read in one transfer per device."""
        if self.file is None:
            return
        # now it is known whether the run goes on from a checkpoint
        if self.open_trackers is not None:
            self.trackers, self.open_trackers = self.open_trackers(self.step), None
        self.step = int(step)
        numbers = to_numbers(values)
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        row = {
            "step": int(step),
            "time": round(time.monotonic() - self.begun, 3),
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }
        if bad:
            row["nonfinite"] = bad
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()
        # The reference adds each group's step, which wandb and trackio can take as the x axis.
        steps = {
            f"{group}/step": int(step) for group in {name.rpartition("/")[0] for name in numbers} if group
        }
        for write, _ in self.trackers:
            write({**steps, **numbers}, int(step))

    def state_dict(self):
        """For a checkpoint: how much was written."""
        self.file.flush()
        return {"bytes": self.file.tell(), "seconds": time.monotonic() - self.begun, "step": self.step}

    def load_state_dict(self, values):
        """From a checkpoint: what was written after it is taken back, since it will be written again."""
        if self.file is None:
            return
        if os.fstat(self.file.fileno()).st_size > values["bytes"]:
            self.file.truncate(values["bytes"])
        self.begun, self.step = time.monotonic() - values["seconds"], values["step"]

    def close(self):
        """Ends the trackers' runs; may be called twice."""
        if self.file is not None:
            self.file.close()
            self.file = None
        while self.trackers:
            self.trackers.pop()[1]()


def to_numbers(values):
    """{name: number or 0-d tensor} -> {name: int or float}; the tensors of a device are read together."""
    out, by_device = {}, {}
    for name, value in values.items():
        if hasattr(value, "ndim") and hasattr(value, "device") and hasattr(value, "detach"):
            if value.ndim != 0:
                raise ValueError(
                    f"{name}: expected a number or a 0-d tensor, got a tensor of shape {list(value.shape)}"
                )
            by_device.setdefault(value.device, {})[name] = value.detach()
            out[name] = None  # keeps the order
        elif isinstance(value, (int, float)) or hasattr(value, "item"):
            number = value.item() if hasattr(value, "item") else value
            out[name] = int(number) if isinstance(number, bool) else number
        else:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got {type(value).__name__}")
    for tensors in by_device.values():
        import torch

        # float64: token counts above 2**24 would be rounded in float32.
        numbers = torch.stack([t.to(torch.float64) for t in tensors.values()]).tolist()
        out.update(zip(tensors, numbers))
    return out


def _tensorboard(folder, project, run_config, name, after):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=after + 1 if after else None)
    writer.add_text(
        "config", "```\n" + json.dumps({"stage": name, **run_config}, indent=2, default=str) + "\n```"
    )

    def write(numbers, step):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return write, writer.close


def _wandb(folder, project, run_config, name, after):
    wandb = importlib.import_module("wandb")
    known = folder / "wandb_run.txt"
    same = {"id": known.read_text(encoding="utf-8"), "resume": "allow"} if after and known.exists() else {}
    run = wandb.init(
        project=project, name=_run_name(folder, name), dir=str(folder), config=run_config, **same
    )
    known.write_text(str(getattr(run, "id", "")), encoding="utf-8")
    return (lambda numbers, step: run.log(numbers, step=step)), run.finish


def _trackio(folder, project, run_config, name, after):
    trackio = importlib.import_module("trackio")
    trackio.init(
        project=project,
        name=_run_name(folder, name),
        config=run_config,
        **({"resume": "allow"} if after else {}),
    )
    return (lambda numbers, step: trackio.log(numbers, step=step)), trackio.finish


def _run_name(folder, name):
    """Tells runs of the same stage apart: <folder>, or <folder>-<stage> when the folder does not say it."""
    return folder.resolve().name if name in folder.name else f"{folder.resolve().name}-{name}"


# after: the last step that an earlier part of the run has told, 0 when there is none.
_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
