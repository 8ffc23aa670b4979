"""Light code imports no engine: recipes and the command line work on a login node, jobs without NeMo-Run.

The modules are imported in a process in which the engines cannot be imported, whatever is installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH_PYTHON = ROOT / ".venv-launch" / "bin" / "python"
ENGINES = (
    "torch",
    "megatron",
    "vllm",
    "zarr",
    "transformers",
    "tokenizers",
    "docker",
    "swebench",
    "nemo_run",
)

# Everything that must import without an engine; a package stands for all modules in it.
LIGHT = (
    "megatron_dagger.types",
    "megatron_dagger.config",
    "megatron_dagger.policies.base",
    "megatron_dagger.envs",
    "megatron_dagger.sandbox",
    "megatron_dagger.dagger",
    "megatron_dagger.observability",
    "megatron_dagger.weights.families",
    "megatron_dagger.weights.transfer_plan",
    "megatron_dagger.planning",
    "megatron_dagger.launch.stages",
    "megatron_dagger.cli",
    "megatron_dagger.recipes",
)

# Programs that run inside the sandbox, beside each other and not as part of the package.
SANDBOX_FILES = ROOT / "megatron_dagger" / "envs" / "repo_repair" / "tools"

IMPORTER = """
import importlib, importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in engines:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

engines, modules = json.loads(sys.stdin.read())
sys.meta_path.insert(0, Absent())
failures = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failures[module] = str(error)
print(json.dumps({"failures": failures, "loaded": sorted(sys.modules)}))
"""


def modules_of(name: str) -> list[str]:
    """Return the module, or all modules of the package, without importing them."""
    path = ROOT.joinpath(*name.split("."))
    if not path.is_dir():
        assert path.with_suffix(".py").is_file(), f"{name} is gone: update the list in this test"
        return [name]
    modules = []
    for file in sorted(path.rglob("*.py")):
        if file.parent == SANDBOX_FILES:
            continue
        parts = file.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return modules


def import_all(modules: list[str], engines: tuple[str, ...] = ENGINES) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTER],
        input=json.dumps([engines, modules]),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LIGHT)
def test_imports_without_any_engine(name):
    modules = modules_of(name)
    assert modules, f"{name} has no modules"
    result = import_all(modules)
    assert result["failures"] == {}
    assert name in result["loaded"]


def test_a_blocked_engine_is_reported():
    """Check the check itself: importing torch fails in it."""
    result = import_all(["torch", "json"])
    assert list(result["failures"]) == ["torch"]


def test_the_command_line_starts_without_loading_an_engine():
    """Engines can be imported here and still must not be loaded, because --help has to answer at once."""
    result = import_all(["megatron_dagger.cli.main"], engines=())
    assert result["failures"] == {}
    assert {name.partition(".")[0] for name in result["loaded"]}.isdisjoint(ENGINES)


def test_recipes_and_command_line_in_the_launch_environment():
    if not LAUNCH_PYTHON.exists():
        pytest.skip("there is no .venv-launch: tools/setup makes it")
    code = "import nemo_run, pkgutil, importlib, megatron_dagger.cli.main\n"
    code += "from megatron_dagger import recipes\n"
    code += "for m in pkgutil.iter_modules(recipes.__path__): importlib.import_module(f'{recipes.__name__}.{m.name}')\n"
    done = subprocess.run([str(LAUNCH_PYTHON), "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
