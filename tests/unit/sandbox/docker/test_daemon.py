"""The name of a container's owner."""

import subprocess

from megatron_dagger.sandbox.docker.daemon import is_gone, owner


def test_the_owner_of_a_container():
    mine = owner()
    assert not is_gone(mine)
    host, boot, pid, _ = mine.rsplit(" ", 3)
    assert is_gone(f"{host} {boot} {pid} 1")
    assert is_gone(f"{host} another-boot {pid} 1")
    assert not is_gone(f"another-host {boot} {pid} 1")
    with subprocess.Popen(["sleep", "60"]) as other:
        name = owner(other.pid)
        assert not is_gone(name)
        other.kill()
    assert is_gone(name)
