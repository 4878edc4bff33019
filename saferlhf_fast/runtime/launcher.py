"""Processes: one for each GPU of this machine, or those that torchrun, deepspeed, SLURM or MPI have started.

    saferlhf-fast ppo-lag recipe.yaml                  all GPUs of this machine; one process on a CPU
    saferlhf-fast ppo-lag recipe.yaml --processes 2    two, on a CPU too
    srun saferlhf-fast ppo-lag recipe.yaml             the processes that srun has started
    (docs/multi-node.md)

`start` is what torchrun does on one machine, with the same variables and a store that this process hosts, but
it hands signals on without ending the run itself (a rank writes a checkpoint first), returns a rank's exit
code, and leaves the last word to the rank that failed. Restarting is the scheduler's work: with resume=auto,
the same command goes on.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from importlib import metadata
from pathlib import Path

from saferlhf_fast.config.stage_table import WITH_SETTINGS
from saferlhf_fast.errors import UserError

COMMANDS = tuple(name for name, spec in WITH_SETTINGS.items() if spec.several_processes)
"""Commands that run in several processes."""

GRACE = 120
"""Seconds that ranks get after a signal that ends them, e.g. for a checkpoint (--grace)."""

SETTLE = 20
"""Seconds that ranks get to end by themselves when one has failed; they know why (watchdog.py)."""

PARENT = "SAFERLHF_LAUNCHER"
HANDED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
PR_SET_PDEATHSIG = 1


# ---------------------------------------------------------------- started by others


def adopt(environ=os.environ):
    """Makes RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of what srun or mpirun say, where no
    launcher has set RANK and there is more than one process. UserError when nobody says where the first
    process is.
    """
    if PARENT in environ and environ[PARENT] == str(os.getppid()):
        _end_with_parent()
    found = {} if "RANK" in environ else _slurm(environ) or _mpi(environ) or {}
    if (found or environ).get("WORLD_SIZE", "1") == "1":
        return
    # A lost rank makes torch print the C++ stack of every socket; watchdog.py says what happened.
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not found:
        return
    if len([x for x in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]) == 1:
        # each task was given a GPU of its own: it is the first that it sees
        found["LOCAL_RANK"] = "0"
    environ.update(found)


def _slurm(environ):
    """The variables of a process that srun has started, None elsewhere (a batch script is no step)."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" not in environ or not {"SLURM_STEP_ID", "SLURM_STEPID"} & set(environ) or tasks == "1":
        return None
    address = environ.get("MASTER_ADDR") or _first_host(environ)
    job = (
        f"{environ.get('SLURM_JOB_ID', '0')}.{environ.get('SLURM_STEP_ID', environ.get('SLURM_STEPID', '0'))}"
    )
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": address,
        "MASTER_PORT": environ.get("MASTER_PORT") or _port(job),
    }


def _first_host(environ):
    """Name of the host of task 0."""
    nodes = (
        environ.get("SLURM_STEP_NODELIST")
        or environ.get("SLURM_JOB_NODELIST")
        or environ.get("SLURM_NODELIST", "")
    )
    if nodes and "[" not in nodes:
        return nodes.split(",")[0]
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    # where srun was called: the first node, in a batch script
    if environ.get("SLURM_LAUNCH_NODE_IPADDR"):
        return environ["SLURM_LAUNCH_NODE_IPADDR"]
    raise UserError(
        f"srun: expected `scontrol show hostnames` to name the first of the nodes {nodes or '(none named)'}; "
        "set MASTER_ADDR to it"
    )


def _mpi(environ):
    """The variables of a process that mpirun has started (OpenMPI; MPICH and others by PMI), None elsewhere."""
    if "OMPI_COMM_WORLD_RANK" in environ:
        rank, size, local, here = (
            environ.get(f"OMPI_COMM_WORLD_{name}", "0")
            for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
    elif "PMI_RANK" in environ and "PMI_SIZE" in environ:
        rank, size = environ["PMI_RANK"], environ["PMI_SIZE"]
        local, here = environ.get("MPI_LOCALRANKID", rank), environ.get("MPI_LOCALNRANKS", "0")
    else:
        return None
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if here == size else None)
    if address is None and size != "1":
        raise UserError(
            "mpirun: expected MASTER_ADDR, the host of the first process, e.g. mpirun -x MASTER_ADDR=node1 …"
        )
    job = (
        environ.get("PMIX_NAMESPACE")
        or environ.get("PMI_JOBID")
        or environ.get("OMPI_MCA_ess_base_jobid")
        or "0"
    )
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local,
        "MASTER_ADDR": address or "127.0.0.1",
        "MASTER_PORT": environ.get("MASTER_PORT") or _port(job),
    }


def _port(job):
    """The same port on all nodes of a job, another for another job: 20000 to 29999, below those given to
    clients.
    """
    return str(20000 + zlib.crc32(str(job).encode()) % 10000)


def _end_with_parent():
    """SIGTERM when the process that started this one dies without a word, so that nothing is left behind."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):  # not Linux
        pass


# ---------------------------------------------------------------- started here


def wanted(asked, check, environ=os.environ):
    """Number of processes that this one is to start; 1: the command runs in this one. asked: the words after
    --processes.

    check: called, before torch is, when there may be several: it refuses bad settings, as the ranks would.
    """
    number = None if asked is None else _number(asked, "--processes", 1)
    if "RANK" in environ:
        there = environ.get("WORLD_SIZE", "1")
        if number not in (None, int(there)) and PARENT not in environ:
            raise UserError(
                f"--processes: expected none, a launcher has started {there} already; got {asked}"
            )
        return 1
    likely = visible(environ)
    guess = number or likely
    if guess < 2:
        return 1
    _as_if(guess, check, environ)
    gpus = _gpus() if likely else 0
    if number is not None and gpus and number > gpus:
        raise UserError(f"--processes: expected at most {gpus}, one for each GPU, got {asked}")
    processes = number or max(1, gpus)
    if processes not in (1, guess):
        _as_if(processes, check, environ)
    return processes


def _as_if(processes, check, environ):
    """Calls check as a rank would: whether a run can be resumed depends on the number of processes."""
    environ["WORLD_SIZE"] = str(processes)
    try:
        check()
    finally:
        del environ["WORLD_SIZE"]


def _number(word, option, least):
    if not re.fullmatch(r"\d{1,5}", word) or int(word) < least:
        raise UserError(f"{option}: expected a whole number from {least} on, got {word}")
    return int(word)


def visible(environ=os.environ):
    """How many GPUs processes may see, without torch; only torch knows for sure whether it can use them."""
    try:
        if metadata.version("torch").endswith("+cpu"):
            return 0
    except metadata.PackageNotFoundError:
        return 0
    there, named = installed(), environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return there
    listed = 0
    for device in map(str.strip, named.split(",")):  # CUDA stops at the first that it does not know
        if not device or device.startswith("-") or (device.isdigit() and int(device) >= there):
            break
        listed += 1
    return listed if there else 0


def installed():
    """GPUs of this machine, as NVIDIA's management library counts them, or by their files in /dev."""
    try:
        library, count = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint(0)
        if library.nvmlInit_v2() == 0:
            found = library.nvmlDeviceGetCount_v2(ctypes.byref(count))
            library.nvmlShutdown()
            if found == 0:
                return count.value
    except (OSError, AttributeError):
        pass
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))


def _gpus():
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def start(words, processes, grace=None):
    """Runs `saferlhf-fast words` in processes of this machine -> exit code: 0, or that of the rank that
    failed first.

    grace: the words after --grace, seconds that ranks get to end after a signal.
    """
    return Group(words, processes, GRACE if grace is None else _number(grace, "--grace", 1)).run()


class Group:
    """The processes of one run on this machine."""

    def __init__(self, words, processes, grace):
        self.words, self.processes, self.grace = words, processes, grace
        # codes: rank -> exit code, in the order in which they ended
        self.ranks, self.codes = [], {}
        # last signal that ends the run, and when ranks are killed for it
        self.asked = self.deadline = None
        self.interrupts = 0
        self.told = set()  # ranks that this process has sent a signal

    def run(self):
        """Starts, waits, and ends what is left."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=max(128, self.processes))
        handled = [
            number
            for number in map(signal.Signals.__getitem__, HANDED_ON)
            if signal.getsignal(number) != signal.SIG_IGN
        ]  # nohup stays nohup
        before = {number: signal.signal(number, self._hand_on) for number in handled}
        try:
            print(
                f"starting {self.processes} processes on this machine"
                + (", one for each GPU" if visible() else "")
                + " (--processes 1 for one)",
                flush=True,
            )
            for rank in range(self.processes):
                self.ranks.append(
                    subprocess.Popen(
                        _command(self.words),
                        start_new_session=True,
                        env=_environment(rank, self.processes, listener),
                    )
                )
            if self.asked is not None:  # came while they were being started
                self._send(self.asked)
            store = _store(listener)  # noqa: F841 lives as long as this function
            self._wait()
        finally:
            for process in self.ranks:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._code()

    def _wait(self):
        """Until all have ended; those that stay behind a failed one get SIGTERM, then SIGKILL."""
        settle = None
        while len(self.codes) < self.processes:
            time.sleep(0.05)
            for rank, process in enumerate(self.ranks):
                if rank not in self.codes and process.poll() is not None:
                    self._ended(rank, process)
            now = time.monotonic()
            if self.deadline is not None and now > self.deadline:
                self._send(signal.SIGKILL)
            elif self.deadline is None and any(self.codes.values()):
                settle = settle or now + SETTLE
                if now > settle:
                    self._send(signal.SIGTERM)
                    self.deadline = now + min(self.grace, SETTLE)

    def _ended(self, rank, process):
        self.codes[rank] = code = process.returncode
        if code < 0 and rank not in self.told and len([c for c in self.codes.values() if c]) == 1:
            print(
                f"error: rank {rank} (process {process.pid}) was ended by {signal.Signals(-code).name}"
                + ("; the kernel does so when memory runs out" if code == -signal.SIGKILL else ""),
                file=sys.stderr,
                flush=True,
            )

    def _hand_on(self, number, _):
        """A signal that this process gets is for all ranks, which end after their step (preemption.py), at
        Ctrl-C at once; a second Ctrl-C kills them.
        """
        self._send(number)
        if number == signal.SIGUSR2:  # not one that ends a run
            return
        self.interrupts += number == signal.SIGINT
        self.asked = number
        self.deadline = time.monotonic() + (self.grace if self.interrupts < 2 else 0)

    def _send(self, number):
        for rank, process in enumerate(self.ranks):
            if process.poll() is None:
                self.told.add(rank)
                process.send_signal(number)

    def _code(self):
        """0, or the code of the first that failed, as a shell has it: 128 + n after signal n."""
        failed = [code for code in self.codes.values() if code]
        if not failed:
            return 0
        own = [
            code
            for rank, code in self.codes.items()
            if code and not (rank in self.told and self.asked is None)
        ]
        code = (own or failed)[0]
        return 128 - code if code < 0 else code


def _command(words):
    """This package with this Python; -P: the current folder may hold a random.py."""
    return [sys.executable, "-P", "-m", "saferlhf_fast", *words]


def _environment(rank, processes, listener):
    """Variables of a rank, those that torchrun sets. The store at MASTER_PORT is hosted by this process."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    if Path(root).name not in ("site-packages", "dist-packages"):
        paths.insert(0, root)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        PARENT: str(os.getpid()),
    }


def _store(listener):
    """The store in which ranks find each other.

    Ranks that come while torch is still being imported wait in the backlog.
    """
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
