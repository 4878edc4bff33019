"""Writing the files of a checkpoint, at once or in the background.

Each file is hashed while it is written, flushed to the disk, and read back. A write that fails is recorded
and not raised: the other ranks wait in DeepSpeed's collectives meanwhile, and all ranks decide together at
the end what to do about it.
"""

import copy
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import disk
from . import manifest, safe_pickle


class CheckpointWriter:
    """Writes the files of one rank into a checkpoint's folder.

    It has the methods that DeepSpeed calls on a checkpoint engine, so that DeepSpeed writes through it.

    Attributes:
        written: Size ("bytes") and hash ("sha256") of each file that was written, by its name in the folder.
        error: The first failure; None without one.
    """

    def __init__(self, folder: str | Path, background: bool = False) -> None:
        """Writes nothing yet.

        Args:
            folder: The checkpoint's folder.
            background: Take copies now, and write them once `start` is called.
        """
        self.folder, self.background = Path(folder), background
        self.written: dict[str, dict[str, Any]] = {}
        self.error: str | None = None
        self.waiting: list[tuple[str, Callable[[Any], object]]] = []
        self.thread: threading.Thread | None = None

    def put(self, name: str, write: Callable[[Any], object]) -> None:
        """Writes one file, or queues it for the background.

        Args:
            name: Relative path in the folder.
            write: Writes the content into the open file that it is given.
        """
        if self.background:
            self.waiting.append((name, write))
        else:
            self._write(name, write)

    def put_json(self, name: str, value: object) -> None:
        """Writes a JSON file.

        Args:
            name: Relative path in the folder.
            value: What JSON can hold.
        """
        text = json.dumps(value).encode()
        self.put(name, lambda file: file.write(text))

    def put_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a safetensors file of copies of the tensors.

        Args:
            name: Relative path in the folder.
            tensors: Tensors of any shape, dtype and device, by name.
        """
        from safetensors.torch import save

        copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
        self.put(name, lambda file: file.write(save(copies)))

    def put_folder(self, name: str, fill: Callable[[Path], object]) -> None:
        """Writes a folder of small files.

        Args:
            name: Relative path of the folder.
            fill: Writes the files into the folder that it is given.
        """
        try:
            with tempfile.TemporaryDirectory() as temporary:
                fill(Path(temporary))
                for path in sorted(p for p in Path(temporary).rglob("*") if p.is_file()):
                    content = path.read_bytes()
                    self.put(
                        f"{name}/{path.relative_to(temporary).as_posix()}",
                        _writes(content),
                    )
        # As in _write: a config or tokenizer that cannot be written must not stop the run.
        except Exception as error:
            self.error = self.error or failure(self.folder / name, error)

    def start(self) -> None:
        """Writes the queued files in the background."""

        def work() -> None:
            while self.waiting:
                self._write(*self.waiting.pop(0))

        self.thread = threading.Thread(target=work, name="checkpoint")
        self.thread.start()

    def is_busy(self) -> bool:
        """True while files are written in the background."""
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Waits until the background has written everything."""
        if self.thread is not None:
            self.thread.join()

    def _write(self, name: str, write: Callable[[Any], object]) -> None:
        """Writes a file and compares it with what is on the disk; a failure is noted in `error`."""
        if self.error is not None:  # the checkpoint is lost already
            return
        path, file = self.folder / name, None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as raw:
                file = _Hashed(raw)
                write(file)
                raw.flush()
                os.fsync(raw.fileno())
            entry = {"bytes": file.count, "sha256": file.digest.hexdigest()}
            if path.stat().st_size != file.count or manifest.sha256(path) != entry["sha256"]:
                raise OSError(f"{path} reads back otherwise than it was written")
            self.written[str(name)] = entry
        # Whatever stops a write (a full disk, a dead mount) must not stop the run, nor leave the other ranks
        # waiting.
        except Exception as error:
            # on a full disk, torch.save raises an error of its own about a wrong position in the file
            self.error = failure(path, (file and file.error) or error)

    # ------------------------------------------------------------ what DeepSpeed calls on a checkpoint engine

    name = "saferlhf-fast"

    def save(self, state_dict: Any, path: str) -> None:
        """Writes a shard; in the background, a copy of it as it is now.

        Args:
            state_dict: What torch.save can write.
            path: Absolute path inside the folder of the checkpoint.
        """
        state = _copied(state_dict) if self.background else state_dict
        self.put(os.path.relpath(path, self.folder), lambda file: torch.save(state, file))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads a shard with safe_pickle.py.

        Args:
            path: The shard's file.
            map_location: As in torch.load; None: the CPU.
        """
        return safe_pickle.load(path, map_location=map_location or "cpu")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing: the folder is created with its first file, where a failure can be recorded."""

    def create(self, info: Any) -> None:
        """Does nothing: Checkpoints begins a checkpoint."""

    def commit(self, info: Any) -> bool:
        """Does nothing: the manifest commits a checkpoint."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether a rank writes what all ranks have in common."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed would have to commit by itself later."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Whether tensors that share storage in memory share it in a file: torch.save sees to it."""
        return True

    def set_commit_info(self, info: Any) -> None:
        """Does nothing: see `commit`."""

    def get_commit_info(self) -> None:
        """Nothing waits for a commit."""
        return None

    def cleanup(self) -> None:
        """Does nothing: no resources are held."""


def failure(path: str | Path, error: Exception) -> str:
    """Words for a file of a checkpoint that could not be written.

    Args:
        path: The file.
        error: What stopped it.
    """
    why = disk.cause(error, path)
    return f"{path}: {why}" if why else f"{path}: {type(error).__name__}: {error}"


def _writes(content: bytes) -> Callable[[Any], object]:
    """A function that writes the content into a file."""
    return lambda file: file.write(content)


class _Hashed:
    """A file that counts and hashes what is written to it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.count, self.digest = raw, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes bytes, or an object with a buffer of them; returns how many."""
        data = memoryview(data).cast("B") if not isinstance(data, (bytes, bytearray)) else data
        try:
            self.raw.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.count += len(data)
        return len(data)

    def flush(self) -> None:
        """Flushes the file underneath."""
        self.raw.flush()


def _copied(value: Any) -> Any:
    """A copy of a state in host memory that training does not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        new = copy.copy(value)  # with the attributes that a state_dict has of its own
        new.update((key, _copied(inner)) for key, inner in value.items())
        return new
    if type(value) in (list, tuple):
        return type(value)(_copied(inner) for inner in value)
    return copy.deepcopy(value)
