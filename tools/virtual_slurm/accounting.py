"""The accounting of a virtual SLURM: slurmdbd with its own MariaDB, for ``sacct``, which NeMo-Run uses to follow jobs.

The database has no user tables and listens only on a socket in the cluster's directory. It starts in a quarter of a
second and disappears with the directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("mariadbd", "slurmdbd", "sacct")
PACKAGES = ("mariadb-server-core", "slurmdbd")

_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=accounting
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
"""


def write_conf(folder: Path, port: int, user: str) -> str:
    """Write slurmdbd.conf to ``folder`` and return the lines that slurm.conf needs for it."""
    path = folder / "slurmdbd.conf"
    path.write_text(_CONF.format(folder=folder, port=port, user=user))
    path.chmod(0o600)  # slurmdbd refuses other modes
    return (
        "AccountingStorageType=accounting_storage/slurmdbd\n"
        f"AccountingStorageHost=localhost\nAccountingStoragePort={port}\n"
        f"AccountingStoragePass={folder}/munge/socket\n"
    )


def database_command(folder: Path, user: str) -> list[str]:
    """Return the command line of the database. It is ready once ``socket_path`` exists."""
    (folder / "database").mkdir()
    return [
        "mariadbd",
        "--no-defaults",
        f"--datadir={folder}/database",
        f"--socket={socket_path(folder)}",
        f"--pid-file={folder}/mariadbd.pid",
        f"--user={user}",
        "--skip-networking",
        "--skip-grant-tables",
        "--innodb-buffer-pool-size=16M",
        "--innodb-log-file-size=4M",
        "--innodb-flush-log-at-trx-commit=0",
    ]


def database_variables(folder: Path) -> Mapping[str, str]:
    """Return the environment variables with which slurmdbd finds the database."""
    return {"MYSQL_UNIX_PORT": str(socket_path(folder))}


def socket_path(folder: Path) -> Path:
    return folder / "mariadbd.socket"
