"""Where a run's numbers go: metrics.jsonl always; TensorBoard, Weights & Biases and trackio by name.

metrics.jsonl has one JSON object a line, {"step", "time" (seconds since the run began), name: number, …},
written out at once. Every line is valid JSON: NaN and inf become null, and `nonfinite` lists their names.
Only rank 0 writes. TensorBoard's files are in <folder>/tensorboard. A disk that takes no files does not end a
run here: lines wait until they can be written, and a tracker whose files cannot be written gets no more
numbers.

Names are those of the reference implementation (PKU-Alignment/safe-rlhf), so that the curves of both can be
compared. Means are over sequences; `*_with_kl_penalty` and `kl_divergence` are sums over a response's tokens;
values, advantages and returns are means over a response's tokens; lengths are in tokens. The reference lacks
these: eval/loss, */grad_norm, train/clip_fraction, train/approx_kl, train/tokens, train/unsafe_share,
train/engine_gap_mean and _max (|log π_trainer − log π_engine| of a token, nats), train/engine_gap_share (of
tokens whose probabilities differ by more than 1 %), train/engine_gap_alarm (1 in a step above the limit),
train/spare_mass and eval/spare_mass (probability of rows without a token, which sampling cuts),
train/spare_mass_alarm, train/importance_weight (mean), train/staleness (PPO steps), eval/kl, eval/length,
eval/unsafe_share, eval/threshold, gold/*.
"""

import contextlib
import functools
import importlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.checks import check_trackers
from . import console, disk
from .line_file import LineFile

if TYPE_CHECKING:
    import torch

    from ..config.sections import Logging

Number = int | float
Tracker = tuple[Callable[[Mapping[str, Number], int], Any], Callable[[], Any]]
"""What writes {name: number} of a step to a tracker, and what ends the tracker's run."""


class Metrics:
    """Writes the numbers of one run. On other ranks than 0 every method does nothing."""

    def __init__(
        self, folder: str | Path, logging_cfg: "Logging", run_config: Mapping[str, Any], name: str
    ) -> None:
        """Opens metrics.jsonl; the trackers are opened at the first line.

        Args:
            folder: Folder of the run.
            logging_cfg: Says which trackers, and the project's name.
            run_config: The settings, for the trackers.
            name: Name of the stage.

        Raises:
            UserError: A tracker's package is not installed.
        """
        # on every rank: if rank 0 alone refused, the others would wait for it until a timeout
        check_trackers(logging_cfg.trackers)
        self.file: LineFile | None = None
        self.trackers: dict[str, Tracker] = {}
        self.open_tracker: Callable[[str, int], Tracker] | None = None
        self.names: list[str] = list(dict.fromkeys(logging_cfg.trackers))
        if int(os.environ.get("RANK", "0")) != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.begun, self.step = time.monotonic(), 0
        self.open_tracker = lambda tracker, after: _OPEN[tracker](
            folder, logging_cfg.project, run_config, name, after
        )
        self.file = LineFile(folder / "metrics.jsonl")

    def log(self, step: int, values: "Mapping[str, Number | torch.Tensor]") -> None:
        """Writes one line.

        Args:
            step: Steps done, from 1.
            values: Numbers and 0-d tensors by name; the tensors are read in one transfer per device.
        """
        if self.file is None:
            return
        # only now it is known whether the run was resumed from a checkpoint
        if self.open_tracker is not None:
            open_tracker, after, self.open_tracker = self.open_tracker, self.step, None
            for tracker in self.names:
                with self._tracking(tracker):
                    self.trackers[tracker] = open_tracker(tracker, after)
        self.step = int(step)
        numbers = to_numbers(values)
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        row: dict[str, Any] = {
            "step": int(step),
            "time": round(time.monotonic() - self.begun, 3),
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }
        if bad:
            row["nonfinite"] = bad
        failed_before = self.file.error is not None
        self.file.append(json.dumps(row, allow_nan=False))
        if self.file.error is not None and not failed_before:
            console.warn(
                f"metrics.jsonl was not written: {self._why(self.file.error)}; the run continues, and its "
                "lines wait until they can be written"
            )
        # The reference adds each group's step, which wandb and trackio can take as the x axis.
        steps = {
            f"{group}/step": int(step) for group in {name.rpartition("/")[0] for name in numbers} if group
        }
        for tracker, (write, _) in list(self.trackers.items()):
            with self._tracking(tracker):
                write({**steps, **numbers}, int(step))

    @contextlib.contextmanager
    def _tracking(self, name: str) -> Iterator[None]:
        """Context of a tracker's call: when a disk takes no files, the tracker is given up, not the run."""
        try:
            yield
        except Exception as error:  # TensorBoard raises what its thread has met, the others their own
            why = disk.cause(error)
            if why is None:
                raise
            console.warn(f"{name} was not written: {why}; the run continues without {name}")
            tracker = self.trackers.pop(name, None)
            if tracker is not None:
                with contextlib.suppress(Exception):  # it would write what is left
                    tracker[1]()

    def _why(self, error: OSError) -> str:
        """The words for a failed write of metrics.jsonl."""
        assert self.file is not None, "it was written just now"
        return disk.cause(error, self.file.file.name) or error.strerror or str(error)

    def state_dict(self) -> dict[str, Any]:
        """How much was written, for a checkpoint; on rank 0 only."""
        assert self.file is not None, "rank 0's metrics are open while it writes a checkpoint"
        self.file.write_waiting()
        return {
            "bytes": self.file.size,
            "waiting": list(self.file.waiting),
            "seconds": time.monotonic() - self.begun,
            "step": self.step,
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Continues from a checkpoint; lines that were written after it are cut off.

        Args:
            values: What `state_dict` gave.
        """
        if self.file is None:
            return
        self.file.cut(values["bytes"], values.get("waiting", ()))  # older checkpoints have none
        self.begun, self.step = time.monotonic() - values["seconds"], values["step"]

    def close(self) -> None:
        """Ends the trackers' runs; may be called twice."""
        if self.file is not None:
            self.file.close()
            if self.file.error is not None:
                console.warn(
                    f"metrics.jsonl: the last {len(self.file.waiting)} lines were not written: "
                    f"{self._why(self.file.error)}"
                )
            self.file = None
        for name in list(self.trackers):
            with self._tracking(name):
                self.trackers.pop(name)[1]()


def to_numbers(values: "Mapping[str, Number | torch.Tensor]") -> dict[str, Number]:
    """Turns 0-d tensors into numbers; the tensors of a device are read together.

    Args:
        values: Numbers and 0-d tensors by name.

    Returns:
        The numbers, in the same order.

    Raises:
        ValueError: A value is neither a number nor a 0-d tensor.
    """
    out: dict[str, Any] = {}
    by_device: dict[Any, dict[str, Any]] = {}
    value: Any
    for name, value in values.items():
        if hasattr(value, "ndim") and hasattr(value, "device") and hasattr(value, "detach"):
            if value.ndim != 0:
                raise ValueError(
                    f"{name}: expected a number or a 0-d tensor, got a tensor of shape {list(value.shape)}"
                )
            by_device.setdefault(value.device, {})[name] = value.detach()
            out[name] = None  # reserves its place in the order
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


def _tensorboard(folder: Path, project: str, run_config: Mapping[str, Any], name: str, after: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    _quiet_writer_threads()
    writer = SummaryWriter(folder / "tensorboard", purge_step=after + 1 if after else None)
    writer.add_text(
        "config", "```\n" + json.dumps({"stage": name, **run_config}, indent=2, default=str) + "\n```"
    )

    def write(numbers: Mapping[str, Number], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return write, writer.close


@functools.cache
def _quiet_writer_threads() -> None:
    """Keeps the traceback of a full disk in TensorBoard's thread off the terminal: `_tracking` has a line."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        error, thread = args.exc_value, type(args.thread).__module__
        if error is None or not thread.startswith("tensorboard.") or disk.cause(error) is None:
            before(args)

    threading.excepthook = hook


def _wandb(folder: Path, project: str, run_config: Mapping[str, Any], name: str, after: int) -> Tracker:
    wandb = importlib.import_module("wandb")
    id_file = folder / "wandb_run.txt"
    resumed: dict[str, Any] = {}
    if after and id_file.exists():
        resumed = {"id": id_file.read_text(encoding="utf-8"), "resume": "allow"}
    run = wandb.init(
        project=project, name=_run_name(folder, name), dir=str(folder), config=run_config, **resumed
    )
    disk.write_text(id_file, str(getattr(run, "id", "")))
    return (lambda numbers, step: run.log(numbers, step=step)), run.finish


def _trackio(folder: Path, project: str, run_config: Mapping[str, Any], name: str, after: int) -> Tracker:
    trackio = importlib.import_module("trackio")
    trackio.init(
        project=project,
        name=_run_name(folder, name),
        config=run_config,
        **({"resume": "allow"} if after else {}),
    )
    return (lambda numbers, step: trackio.log(numbers, step=step)), trackio.finish


def _run_name(folder: Path, name: str) -> str:
    """The run's name at a tracker: <folder>, with -<stage> behind it unless the folder's name holds it."""
    return folder.resolve().name if name in folder.name else f"{folder.resolve().name}-{name}"


# after: the last step that the tracker got before the run was resumed; 0 in a new run.
_OPEN: dict[str, Callable[[Path, str, Mapping[str, Any], str, int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
