"""The list of started containers: whose they are, and when they leave it."""

import os

from megatron_dagger.sandbox.docker.forgotten import StartedContainers


def test_containers_leave_the_list_when_they_are_removed_or_nothing_is_left_of_them(tmp_path):
    started, others = StartedContainers("daemon", tmp_path), StartedContainers("other", tmp_path)
    for container in ("removed", "known", "gone"):
        started.add(container)
    others.add("elsewhere")
    started.drop("removed")
    started.drop("removed")
    assert started.end_forgotten(lambda container: container == "known") == []  # no process remains of any
    assert {path.name for path in tmp_path.iterdir()} == {"known", "elsewhere"}


def test_a_folder_that_others_can_write_in_is_not_used(tmp_path):
    (tmp_path / "open").mkdir()
    os.chmod(tmp_path / "open", 0o777)
    os.symlink(tmp_path / "open", tmp_path / "link")
    for name in ("open", "link"):
        started = StartedContainers("daemon", tmp_path / name)
        started.add("a")
        (tmp_path / "open" / "1").write_text("daemon")
        assert started.end_forgotten(lambda container: False) == []
        assert [path.name for path in (tmp_path / "open").iterdir()] == ["1"]
