"""A SLURM cluster of two nodes on this machine, with the real daemons in namespaces of their own.

The namespace of the network has only a loopback interface, with one address for each node. The first process of the namespace of
processes is a shell; killing it ends all daemons and jobs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments import ROOT
from tests.helpers.search_helpers import wait_for

PROGRAMS = ("slurmctld", "slurmd", "munged", "unshare", "nsenter", "ip", "mount")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
UNSHARE = ["unshare", *NAMESPACES, "--fork", "--mount-proc"]
ADDRESSES = {"node1": "10.9.0.1", "node2": "10.9.0.2"}  # not those of 127/8, which getaddrinfo ignores without others
CONFIGURATION = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5  # a requeued job waits for this time
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=node1 NodeAddr=10.9.0.1 Port=6818 CPUs=2
NodeName=node2 NodeAddr=10.9.0.2 Port=6819 CPUs=2
PartitionName=normal Nodes=node[1-2] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] PriorityTier=2 PreemptMode=OFF
"""
START = """
set -e
cd {folder}
mount --bind hosts /etc/hosts
ip link set lo up
ip address add 10.9.0.1/32 dev lo
ip address add 10.9.0.2/32 dev lo
hostname node1
munged --force --key-file={folder}/munge.key --socket={folder}/munge.socket --pid-file={folder}/munge.pid \
    --log-file={folder}/munge.log --seed-file={folder}/munge.seed
slurmctld -D &
slurmd -D -N node1 &
unshare --uts sh -c 'hostname node2; exec slurmd -D -N node2' &
wait
"""


def unavailable() -> str | None:
    """Return why the cluster cannot be started; None if it can."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid():
        return "only root may start the daemons of SLURM"
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        return "this machine permits no namespaces"
    return None


class Cluster:
    """A cluster that runs.

    Args:
        folder: folder with its configuration, state and logs.
        shell: process id of the first process in its namespaces.
    """

    def __init__(self, folder: Path, shell: int) -> None:
        self.folder, self.shell = folder, shell

    def call(self, *words: str, **variables: str) -> str:
        """Run a command on the first node, in the current folder, and return its output."""
        enter = ["nsenter", "--target", str(self.shell), *NAMESPACES, f"--wd={Path.cwd()}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_CONF": str(self.folder / "slurm.conf"), **variables}
        result = subprocess.run([*enter, *words], env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, *arguments: str, **variables: str) -> str:
        """Run `darkroom submit` and return the id of the job; `variables` extend the environment of the job."""
        output = self.call(sys.executable, "-m", "experiments", "submit", *arguments, **variables)
        return re.search(r"submitted (\d+)", output)[1]

    def show(self, job: str) -> dict[str, str]:
        """Return what SLURM says of a job, such as JobState and Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))

    def wait(self, job: str, state: str, seconds: int) -> None:
        """Wait until a job has a state."""
        wait_for(lambda: self.show(job)["JobState"] == state, seconds)

    def processes(self, job: str) -> dict[int, int]:
        """Return the process ids of a job's trainings by rank, as seen from outside of the namespaces."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                variables = dict(line.split(b"=", 1) for line in (folder / "environ").read_bytes().split(b"\0") if b"=" in line)
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            if b"fit" in words and variables.get(b"SLURM_JOB_ID") == job.encode() and b"SLURM_PROCID" in variables:
                rank = int(variables[b"SLURM_PROCID"])
                if b"srun" not in words[0] and found.get(rank) != parent:  # not a loader process of the training
                    found[rank] = int(folder.name)
        return found


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in an empty folder with a short path, and kill all of its processes at the end."""
    for name in ("state", "spool-node1", "spool-node2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "start.sh").write_text(START.format(folder=folder))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in ADDRESSES.items()))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with (folder / "output").open("w") as output:
        outer = subprocess.Popen(
            [*UNSHARE, "bash", str(folder / "start.sh")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    wait_for(lambda: outer.poll() is not None or children.read_text().split(), 10)
    shell = int(children.read_text().split()[0])
    try:
        running = Cluster(folder, shell)
        sinfo = ["nsenter", "--target", str(shell), *NAMESPACES, "sinfo", "--noheader", "--format=%D %t", "--partition=normal"]

        def ready() -> bool:
            assert outer.poll() is None, (folder / "output").read_text()
            return subprocess.run(sinfo, env=environment, capture_output=True, text=True).stdout == "2 idle\n"

        wait_for(ready, 60)
        yield running
    finally:
        os.kill(shell, signal.SIGKILL)
        outer.wait()
