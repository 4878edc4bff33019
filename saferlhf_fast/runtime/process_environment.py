"""The environment variables by which a process knows its rank, whoever has started it.

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. `adopt` derives them
from what srun and mpirun set; `rank_environment` sets them for the processes of launcher.py. Without torch.
"""

import ctypes
import os
import signal
import socket
import subprocess
import zlib
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from saferlhf_fast.errors import UserError

LAUNCHER_PID = "SAFERLHF_LAUNCHER"
"""Variable with the process number of the launcher.py process that has started this one."""

_PR_SET_PDEATHSIG = 1  # of prctl(2)


def adopt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the variables of srun or mpirun.

    Nothing is set where a launcher has set RANK, or where there is only one process.

    Args:
        environ: The variables, which are read and added to.

    Raises:
        UserError: No variable says on which machine the first process runs.
    """
    if LAUNCHER_PID in environ and environ[LAUNCHER_PID] == str(os.getppid()):
        _end_with_parent()
    derived = {} if "RANK" in environ else _slurm(environ) or _mpi(environ) or {}
    if (derived or environ).get("WORLD_SIZE", "1") == "1":
        return
    # When a rank is lost, torch prints the C++ stack of every socket; watchdog.py reports what happened.
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not derived:
        return
    if len([x for x in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]) == 1:
        # each task got a GPU of its own, which is the only one that it sees
        derived["LOCAL_RANK"] = "0"
    environ.update(derived)


def _slurm(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The variables of a process that srun has started; None elsewhere (a batch script is no step)."""
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


def _first_host(environ: Mapping[str, str]) -> str:
    """Name or address of the host of task 0."""
    nodes = (
        environ.get("SLURM_STEP_NODELIST")
        or environ.get("SLURM_JOB_NODELIST")
        or environ.get("SLURM_NODELIST", "")
    )
    if nodes and "[" not in nodes:
        return nodes.split(",")[0]
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            encoding="utf-8",
            timeout=30,
            check=True,
        )
        return names.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    # the node where srun was called; in a batch script that is the first one
    if environ.get("SLURM_LAUNCH_NODE_IPADDR"):
        return environ["SLURM_LAUNCH_NODE_IPADDR"]
    raise UserError(
        f"srun: expected `scontrol show hostnames` to name the first of the nodes {nodes or '(none named)'}; "
        "set MASTER_ADDR to it"
    )


def _mpi(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The variables of a process that mpirun has started (OpenMPI, or PMI as in MPICH); None elsewhere."""
    if "OMPI_COMM_WORLD_RANK" in environ:
        rank, size, local_rank, local_size = (
            environ.get(f"OMPI_COMM_WORLD_{name}", "0")
            for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
    elif "PMI_RANK" in environ and "PMI_SIZE" in environ:
        rank, size = environ["PMI_RANK"], environ["PMI_SIZE"]
        local_rank = environ.get("MPI_LOCALRANKID", rank)
        local_size = environ.get("MPI_LOCALNRANKS", "0")
    else:
        return None
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else None)
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
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": address or "127.0.0.1",
        "MASTER_PORT": environ.get("MASTER_PORT") or _port(job),
    }


def _port(job: str) -> str:
    """A port that is the same on all nodes of a job, and another one for another job.

    It is from 20000 to 29999, below the range that systems give to clients.
    """
    return str(20000 + zlib.crc32(job.encode()) % 10000)


def _end_with_parent() -> None:
    """Lets the kernel send SIGTERM when the parent process dies, so that no process is left behind."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):  # not Linux
        pass


def rank_environment(rank: int, processes: int, listener: socket.socket) -> dict[str, str]:
    """The variables of a process that launcher.py starts: this process's own, and those that torchrun sets.

    Args:
        rank: Rank of the process.
        processes: How many are started, all on this machine.
        listener: The socket of the store in which ranks find each other; this process hosts it.
    """
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
        LAUNCHER_PID: str(os.getpid()),
    }
