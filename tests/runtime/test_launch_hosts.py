"""One recipe under every launcher (alone, torchrun, deepspeed, srun) gives the same numbers.

The two machines are two network namespaces if this machine permits user namespaces, else two nodes of the
loopback.
"""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kit
import pytest
import yaml

SUPPORT = Path(__file__).parents[1] / "support"
BIN = Path(sys.executable).parent
SLURM = kit.ROOT / "examples" / "slurm" / "ppo_lag.sbatch"
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount"]
SRUN = r"""
# srun: the tasks of a step on this machine, with SLURM's variables; two, whatever was asked for.
while [[ $1 == -* ]]; do shift; done
step=$(cat "$STUBS/step" 2>/dev/null || echo 0)
echo $((step + 1)) > "$STUBS/step"; echo "$@" >> "$STUBS/srun.log"
for task in 0 1; do
    SLURM_STEP_ID=$step SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=$task \
        SLURM_STEP_NODELIST='host[1-2]' "$@" & pids[$task]=$!
done
trap 'kill -TERM ${pids[@]}' TERM
code=0
for pid in ${pids[@]}; do
    wait $pid; one=$?
    while kill -0 $pid 2>/dev/null; do wait $pid; one=$?; done      # a trap interrupts wait
    [ $one -gt $code ] && code=$one
done
exit $code
"""
SCONTROL = 'echo "$@" >> "$STUBS/scontrol.log"; [ "$1 $2" = "show hostnames" ] && echo 127.0.0.1'
PDSH = r"""
# pdsh -S -f N -w HOSTS WORDS: the command once for each host, %n is its number; the hosts are this machine.
while [[ $1 == -* ]]; do case $1 in -w) hosts=$2; shift 2;; -f) shift 2;; *) shift;; esac; done
n=0; pids=(); command="$*"
for host in ${hosts//,/ }; do bash -c "${command//%n/$n}" & pids+=($!); n=$((n + 1)); done
code=0; for pid in ${pids[@]}; do wait $pid || code=$?; done; exit $code
"""


@functools.cache
def machines():
    """How two machines are simulated: "namespaces", each with its own network and address, or "loopback"."""
    probe = (
        "ip link add va type veth peer name vb && unshare --net --pid --fork true "
        "&& mount --bind /dev/null /etc/hosts"
    )
    try:
        completed = subprocess.run([*NAMESPACES, "bash", "-c", probe], capture_output=True, timeout=30)
        return "loopback" if completed.returncode else "namespaces"
    except (OSError, subprocess.SubprocessError):
        return "loopback"


def environment(**more):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{kit.ROOT}:{SUPPORT}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **{name: str(value) for name, value in more.items()},
    }


def on_two_machines(command, timeout=200, **env):
    """Runs a shell command on both machines; returns a CompletedProcess.

    $NODE is 0 or 1, $FIRST the address of machine 0, $OWN the machine's own address.
    """
    if machines() == "namespaces":
        start = [*NAMESPACES, "bash", str(SUPPORT / "two_hosts.sh")]
        command = "export FIRST=10.77.0.1 OWN=10.77.0.$((NODE + 1)) PORT=29500; " + command
    else:
        start = [
            "bash",
            "-c",
            'NODE=1 bash -c "$0" & NODE=0 bash -c "$0"; code=$?; wait $! || code=$?; exit $code',
        ]
        command = f"export FIRST=127.0.0.1 OWN=127.0.0.1 PORT={kit.free_port()}; " + command
    return subprocess.run(
        [*start, command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=kit.ROOT,
        env=environment(**env),
    )


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A recipe and its losses in two processes that the command itself starts."""
    folder = tmp_path_factory.mktemp("hosts")
    recipe = folder / "sft.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": kit.make_model(folder / "model"),
                "data": kit.make_data(folder / "data", n=16)["sft"],
                "train": {"max_steps": 3, "batch_size": 2},
                "engine": {"zero_stage": 2},
                "log": {"progress": False},
            }
        )
    )
    done = kit.command("sft", recipe, f"output={folder / 'alone'}", "--processes", "2", fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("starting 2 processes on this machine")
    return recipe, kit.losses(folder / "alone")


def assert_same(losses, expected):
    assert len(losses) == len(expected) == 3, (losses, expected)
    assert all(abs(a - b) < 1e-5 for a, b in zip(losses, expected)), (losses, expected)


@pytest.fixture
def stubs(tmp_path):
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("pdsh", PDSH), ("ssh", "exit 0")):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.numeric
@pytest.mark.faults
def test_torchrun_on_two_machines(sft, tmp_path, record_property):
    recipe, losses = sft
    print(f"two machines: {machines()}")
    record_property("two_machines", machines())
    done = on_two_machines(
        "torchrun --nnodes 2 --node-rank $NODE --nproc-per-node 1 --master-addr $FIRST --master-port $PORT "
        f"-m saferlhf_fast sft {recipe} output={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(kit.losses(tmp_path / "out"), losses)


@pytest.mark.faults
def test_torchrun_with_a_rendezvous_on_two_machines_after_a_preflight(tmp_path):
    done = on_two_machines(
        "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id 1 --local-addr $OWN "
        f"--rdzv-endpoint $FIRST:$PORT -m saferlhf_fast info --cluster --folder {tmp_path}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "renames are atomic" in done.stdout
    if machines() == "namespaces":
        assert "2 ranks on 2 machines" in done.stdout and re.search(
            r"rank   \d  hostb  10\.77\.0\.2", done.stdout
        ), done.stdout


@pytest.mark.faults
def test_a_rank_of_a_machine_that_is_gone_is_named(tmp_path):
    """The network of hostb ends with it, so hosta is not notified that its connections are closed."""
    if machines() != "namespaces":
        pytest.skip("needs two network namespaces")
    done = on_two_machines(
        f"torchrun --nnodes 2 --node-rank $NODE --nproc-per-node 1 --master-addr $FIRST --master-port $PORT "
        f"{SUPPORT / 'watch_small.py'} kill 1 10 1",
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    assert done.returncode == 1
    assert re.search(
        r"\[rank 0\] ended: rank 1 \(hostb, process \d+\) is gone: no sign of life for \d+ s", done.stderr
    ), done.stderr


@pytest.mark.numeric
@pytest.mark.faults
@pytest.mark.parametrize("hosts", ["localhost slots=2", "localhost slots=1\n127.0.0.1 slots=1"])
def test_deepspeed_with_a_host_file(sft, tmp_path, stubs, hosts):
    """With two hosts, replacements of pdsh and ssh start everything on this machine."""
    recipe, losses = sft
    (tmp_path / "hosts").write_text(hosts + "\n")
    done = subprocess.run(
        [
            BIN / "deepspeed",
            "--hostfile",
            tmp_path / "hosts",
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(kit.free_port()),
            "--module",
            "saferlhf_fast",
            "sft",
            recipe,
            f"output={tmp_path / 'out'}",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=kit.ROOT,
        env=environment(DS_ACCELERATOR="cpu", PATH=f"{stubs}:{BIN}:{os.environ['PATH']}"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same(kit.losses(tmp_path / "out"), losses)


def lag(folder):
    base = kit.make_model(folder / "model")
    scores, data = kit.make_scores(folder, base), kit.make_data(folder / "data", n=16)
    recipe = folder / "lag.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": base,
                **scores,
                "data": data["prompts"],
                "output": str(folder / "out"),
                "max_length": 32,
                "ppo": {"batch_size": 2, "prompt_epochs": 1000, "max_steps": 2000},
                "log": {"progress": False},
            }
        )
    )
    return recipe


def slurm_job(recipe, stubs, step, restarts):
    """Runs the script and sends SIGTERM to its tasks, as SLURM does, once more than `step` steps are logged.

    Returns (output, exit code).
    """
    folder = recipe.parent
    env = environment(
        STUBS=stubs,
        PATH=f"{stubs}:{BIN}:{os.environ['PATH']}",
        SLURM_JOB_ID=7,
        SLURM_SUBMIT_DIR=folder,
        SLURM_CPUS_PER_TASK=1,
        SLURM_RESTART_COUNT=restarts,
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    job = subprocess.Popen(
        ["bash", str(SLURM), str(recipe)],
        env=env,
        text=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline, metrics = time.monotonic() + 150, folder / "out" / "metrics.jsonl"
        while time.monotonic() < deadline and job.poll() is None:
            if metrics.exists() and max(kit.steps(folder / "out"), default=0) > step:
                break
            time.sleep(0.2)
        tasks = subprocess.run(
            ["pgrep", "-g", str(job.pid), "-f", f"{stubs}/srun"], capture_output=True, text=True
        ).stdout
        assert tasks, f"the job has ended: {job.communicate()[0]}"
        os.kill(int(tasks.split()[0]), signal.SIGTERM)
        return job.communicate(timeout=60)[0], job.returncode
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.faults
def test_the_slurm_script_is_queued_again_and_resumes_after_its_time_is_up(tmp_path, stubs):
    """Replacements play the part of srun, scontrol and the signal of SLURM."""
    recipe = lag(tmp_path)
    output, code = slurm_job(recipe, stubs, 1, restarts=0)
    assert code == 143, output
    assert "stopped with a checkpoint; queued again (restart 1)" in output and "renames are atomic" in output
    scontrol_calls = (stubs / "scontrol.log").read_text()
    assert "show hostnames host[1-2]" in scontrol_calls and "requeue 7" in scontrol_calls
    assert (stubs / "srun.log").read_text().splitlines()[-1].startswith("saferlhf-fast ppo-lag")
    before = max(kit.steps(tmp_path / "out"))
    output, code = slurm_job(recipe, stubs, before + 1, restarts=20)
    assert code == 143 and "queued again" not in output, output  # the limit of restarts is reached
    steps = [step for step in kit.steps(tmp_path / "out") if step]
    assert steps == sorted(set(steps)) and steps[-1] > before, "it did not resume where it stopped"


def test_the_slurm_script_has_the_lines_that_the_documentation_names():
    text = SLURM.read_text()
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    for line in (
        "#SBATCH --signal=TERM@180",
        "#SBATCH --requeue",
        "resume=auto",
        "scontrol requeue",
        "info --cluster",
    ):
        assert line in text


def test_the_kubernetes_manifest_is_consistent():
    jobset = yaml.safe_load((kit.ROOT / "examples" / "k8s" / "ppo_lag.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    name = jobset["metadata"]["name"]
    # <jobset>-<job>-<replica>-<pod>.<subdomain>
    assert env["FIRST"] == f"{name}-{job['name']}-0-0.{name}"
    assert (
        int(env["NODES"]) == spec["parallelism"] == spec["completions"]
        and spec["completionMode"] == "Indexed"
    )
    assert int(env["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    mounts = [m["mountPath"] for m in container["volumeMounts"]]
    assert (
        any(env["RECIPE"].startswith(mount + "/") for mount in mounts) and container["workingDir"] in mounts
    )
    (script,) = container["args"]
    assert "resume=auto" in script and "exec torchrun" in script
    used = set(re.findall(r"\$\{?([A-Z_]+)", script))
    assert used <= set(env), used - set(env)
    assert {f"containerPort: {p['containerPort']}" for p in container["ports"]} == {
        f"containerPort: {port}" for port in re.findall(r"meet \w+ (\d+)", script)
    }
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
