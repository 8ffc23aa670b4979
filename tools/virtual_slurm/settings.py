"""The settings of a virtual SLURM: slurm.conf and gres.conf, and sbatch files adapted to the size of its nodes."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from tools.support.ports import free_ports
from tools.virtual_slurm import accounting

NODES = ("n1", "n2")
GPUS_PER_NODE = 4
WAIT_S = 2  # from a step's first ended task until SLURM kills the others, unless srun --wait says otherwise

_SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
{accounting}\
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
DependencyParameters=kill_invalid_depend
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
WaitTime={wait_s}
SlurmdTimeout=5
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=16000 Gres=gpu:4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=16000 Gres=gpu:4
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=5 GraceTime=30
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""


def conf_path(folder: Path) -> Path:
    return folder / "slurm.conf"


def write_settings(folder: Path, user: str, *, with_accounting: bool) -> None:
    """Write the cluster's configuration files to ``folder``, with free ports, and its made-up GPU devices."""
    host = socket.gethostname().partition(".")[0]
    *ports, accounting_port = free_ports(4)
    accounting_lines = "AccountingStorageType=accounting_storage/none\n"
    if with_accounting:
        accounting_lines = accounting.write_conf(folder, accounting_port, user)
    cpus = len(os.sched_getaffinity(0))
    values = {
        "host": host, "ports": ports, "user": user, "accounting": accounting_lines, "cpus": cpus, "wait_s": WAIT_S,
    }  # fmt: skip
    conf_path(folder).write_text(_SLURM_CONF.format(folder=folder, **values))
    for number in range(GPUS_PER_NODE):  # SLURM drains a node whose GPUs have no device files
        os.mknod(folder / "dev" / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/dev/gpu[0-3]\n")


def adapt_to_cluster(file: Path, folder: Path) -> Path:
    """Copy an sbatch file to ``folder`` with its requests changed to this cluster's nodes; return the copy.

    Each component of a heterogeneous job gets one node.
    """
    text = file.read_text()
    for original, adapted in (("gpus-per-node=8", "gpus-per-node=4"), ("mem=0", "mem=8000"), ("nodes=2", "nodes=1")):
        text = text.replace(f"#SBATCH --{original}", f"#SBATCH --{adapted}")
    copy = folder / file.name
    copy.write_text(text)
    return copy
