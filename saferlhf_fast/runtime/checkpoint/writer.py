"""Writing the files of a checkpoint: hashed as they are written, put on the disk, read again; at once or in
the background.

A write that fails is remembered and not raised: the other ranks wait in DeepSpeed's collectives meanwhile,
and what to do about it is decided by all of them together, at the end.
"""

import copy
import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path

import torch

from . import manifest, safe_pickle


class CheckpointWriter:
    """What one rank writes into a checkpoint's folder. DeepSpeed takes it for its own checkpoint engine."""

    def __init__(self, folder, background=False):
        """background: take copies now, write them when `start` is called."""
        self.folder, self.background = Path(folder), background
        # {name in the folder: {"bytes", "sha256"}}, first failure
        self.written, self.error = {}, None
        self.waiting, self.thread = [], None

    def put(self, name, write):
        """Writes one file, or notes it for the background. write: open file -> None."""
        if self.background:
            self.waiting.append((name, write))
        else:
            self._write(name, write)

    def put_json(self, name, value):
        """Writes a JSON file."""
        text = json.dumps(value).encode()
        self.put(name, lambda file: file.write(text))

    def put_tensors(self, name, tensors):
        """Writes a safetensors file."""
        from safetensors.torch import save

        copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
        self.put(name, lambda file: file.write(save(copies)))

    def put_folder(self, name, make):
        """Adds the files that `make(folder)` writes into a folder of that name; small ones."""
        try:
            with tempfile.TemporaryDirectory() as temporary:
                make(Path(temporary))
                for path in sorted(p for p in Path(temporary).rglob("*") if p.is_file()):
                    content = path.read_bytes()
                    self.put(
                        f"{name}/{path.relative_to(temporary).as_posix()}",
                        lambda file, c=content: file.write(c),
                    )
        # As in _write: no config or tokenizer is worth a run.
        except Exception as error:
            self.error = self.error or f"{name}: {type(error).__name__}: {error}"

    def start(self):
        """Writes in the background what waits."""

        def work():
            while self.waiting:
                self._write(*self.waiting.pop(0))

        self.thread = threading.Thread(target=work, name="checkpoint")
        self.thread.start()

    def is_busy(self):
        """True while the background writes."""
        return self.thread is not None and self.thread.is_alive()

    def wait(self):
        """Waits for the background."""
        if self.thread is not None:
            self.thread.join()

    def _write(self, name, write):
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
            said = {"bytes": file.count, "sha256": file.digest.hexdigest()}
            if path.stat().st_size != file.count or manifest.sha256(path) != said["sha256"]:
                raise OSError(f"{path} reads back otherwise than it was written")
            self.written[str(name)] = said
        # Whatever stops a write (a full disk, a dead mount) must not stop the run, nor leave the other ranks
        # waiting.
        except Exception as error:
            # torch.save says of a full disk that its file is somewhere else
            cause = (file and file.error) or error
            self.error = f"{path}: {type(cause).__name__}: {cause}"

    # ------------------------------------------------------------ what DeepSpeed asks of a checkpoint engine

    name = "saferlhf-fast"

    def save(self, state_dict, path):
        state = _copied(state_dict) if self.background else state_dict
        self.put(os.path.relpath(path, self.folder), lambda file: torch.save(state, file))

    def load(self, path, map_location=None):
        return safe_pickle.load(path, map_location=map_location or "cpu")

    def makedirs(self, path, exist_ok=False):
        """Made when the first file is written into it, where a failure can be told."""

    def create(self, info):
        pass

    def commit(self, info):
        return True

    def is_data_parallel_writer(self, dp_rank):
        return dp_rank == 0

    def is_decoupled(self):
        return False

    def preserves_storage_sharing(self):
        return True

    def set_commit_info(self, info):
        pass

    def get_commit_info(self):
        return None

    def cleanup(self):
        pass


class _Hashed:
    """A file that counts and hashes what is written to it."""

    def __init__(self, raw):
        self.raw, self.count, self.digest, self.error = raw, 0, hashlib.sha256(), None

    def write(self, data):
        data = memoryview(data).cast("B") if not isinstance(data, (bytes, bytearray)) else data
        try:
            self.raw.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.count += len(data)
        return len(data)

    def flush(self):
        self.raw.flush()


def _copied(value):
    """A copy of a state on the host that training does not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        new = copy.copy(value)  # a state_dict's own attributes with it
        new.update((key, _copied(inner)) for key, inner in value.items())
        return new
    if type(value) in (list, tuple):
        return type(value)(_copied(inner) for inner in value)
    return copy.deepcopy(value)
