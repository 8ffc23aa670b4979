"""Install SLURM, or start a virtual cluster of two nodes by hand.

.venv/bin/python -m tools.virtual_slurm install    install SLURM's Debian packages (as root)
.venv/bin/python -m tools.virtual_slurm up         start a cluster, print how to use it, stop it at Ctrl-C
"""

from __future__ import annotations

import argparse
import signal
import sys

from tools.virtual_slurm.cluster import SlurmCluster
from tools.virtual_slurm.packages import SlurmError, install


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.virtual_slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["install", "up"], help="up installs too, if SLURM is missing")
    arguments = parser.parse_args()
    try:
        install()
        if arguments.command == "up":
            with SlurmCluster() as cluster:
                print(f"export SLURM_CONF={cluster.conf}", flush=True)
                signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except SlurmError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
