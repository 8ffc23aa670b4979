"""Which servers are asked past the proxy that the environment names.

Clusters often reach the internet through HTTP_PROXY or ALL_PROXY. Such a proxy cannot reach a server on the cluster's
own nodes, and NO_PROXY rarely names them.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit


def direct_mounts(urls: Iterable[str]) -> dict[str, None]:
    """Return httpx's ``mounts`` for the servers of ``urls`` that no proxy is asked for: see ``is_near``."""
    hosts = {urlsplit(url).hostname or "" for url in urls}
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None for host in sorted(hosts) if is_near(host)}


def is_near(host: str) -> bool:
    """Return whether ``host`` is this one or a cluster's node: a name without a dot, a loopback or private address."""
    try:
        return ipaddress.ip_address(host).is_private  # loopback and link-local addresses too
    except ValueError:
        return bool(host) and ("." not in host or host.lower() == socket.gethostname().lower())
