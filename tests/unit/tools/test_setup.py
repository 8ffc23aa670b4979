"""The set-up's decisions: pip's settings for uv, the choice of Python, error messages, the lock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.setup_parts import installers, steps, system

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def pip_config(tmp_path, monkeypatch):
    """The path of a file that holds the only pip settings of this test."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return path


def test_pip_settings_are_read_and_the_environment_overrides_files(pip_config, monkeypatch):
    pip_config.write_text(
        "[global]\nindex-url = https://a.example/simple\nfind-links =\n    /one\n    /two\n"
        "[install]\nextra-index-url = https://b.example/simple\n"
    )
    monkeypatch.setenv("PIP_INDEX_URL", "https://c.example/simple")
    settings = installers.pip_settings(sys.executable)
    assert settings["index-url"] == ["https://c.example/simple"]
    assert settings["find-links"] == ["/one", "/two"]
    assert settings["extra-index-url"] == ["https://b.example/simple"]


def test_uv_gets_pips_settings():
    settings = {
        "index-url": ["https://a.example/simple"],
        "extra-index-url": ["https://b.example/simple"],
        "find-links": ["/one", "/two"],
        "trusted-host": ["a.example"],
        "cert": ["/certs.pem"],
    }
    arguments, env = installers.translate(settings, {installers.TORCH_INDEX: "https://torch.example/cpu"})
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    assert ("--index-url", "https://a.example/simple") in pairs
    assert [value for flag, value in pairs if flag == "--extra-index-url"] == [
        "https://b.example/simple",
        "https://torch.example/cpu",
    ]
    assert [value for flag, value in pairs if flag == "--find-links"] == ["/one", "/two"]
    assert ("--allow-insecure-host", "a.example") in pairs
    assert env["SSL_CERT_FILE"] == "/certs.pem"


def test_uvs_own_settings_are_not_overridden():
    settings = {"index-url": ["https://a.example/simple"], "cert": ["/certs.pem"]}
    own = {"UV_DEFAULT_INDEX": "https://own.example/simple", "SSL_CERT_FILE": "/own.pem"}
    arguments, env = installers.translate(settings, own)
    assert "--index-url" not in arguments
    assert env["SSL_CERT_FILE"] == "/own.pem"


@pytest.mark.parametrize(
    ("output", "hint"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "MEGATRON_DAGGER_TORCH_INDEX"),
        (
            "Because there is no version of torch==2.13.0+cpu and you require it",
            "MEGATRON_DAGGER_TORCH_INDEX",
        ),
        ("dns error: failed to lookup address information", "index cannot be reached"),
        ("NewConnectionError: Temporary failure in name resolution", "index cannot be reached"),
        ("an unknown error", "whole output is in"),
    ],
)
def test_a_failed_step_shows_its_output_and_a_hint(output, hint, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "LOG", tmp_path / "log")
    with pytest.raises(steps.SetupError, match="the step: failed") as caught:
        steps.run("the step", [sys.executable, "-c", f"import sys; sys.exit({output!r})"])
    assert output in str(caught.value)
    assert hint in str(caught.value)


def test_an_unsuitable_python_is_named_with_a_hint(tmp_path):
    wrong = tmp_path / "python"
    wrong.write_text("#!/bin/sh\necho 3 9\necho $0\n")
    wrong.chmod(0o755)
    with pytest.raises(steps.SetupError, match=r"it is Python 3\.9(.|\n)*--python"):
        system.find_python(str(wrong), (3, 12))
    with pytest.raises(steps.SetupError, match=r"nowhere/python(.|\n)*--python"):
        system.find_python("/nowhere/python", (3, 12))


def test_too_little_disk_space_is_an_error_with_numbers():
    system.check_disk(0.0)
    with pytest.raises(steps.SetupError, match=r"GB are free .* 10000000\.0 GB are needed"):
        system.check_disk(1e7)


def test_a_second_set_up_waits_for_the_first(tmp_path, monkeypatch):
    """The second gets the lock only after the first has released it, and names the process it waits for."""
    code = (
        "import sys; from pathlib import Path; from tools.setup_parts import steps\n"
        f"steps.CACHE = Path({str(tmp_path)!r})\n"
        "with steps.lock(): print('held', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == "held\n"
        with subprocess.Popen(command, **pipes) as second:
            assert f"process {first.pid}): waiting" in second.stdout.readline()
            first.communicate("\n", timeout=30)
            assert second.stdout.readline() == "held\n"
            second.communicate("\n", timeout=30)
    assert first.returncode == second.returncode == 0
