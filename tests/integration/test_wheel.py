"""The command line works from the wheel, installed without the checkout and with its declared dependencies only."""

import tarfile
import zipfile

import pytest

from megatron_dagger.cli.main import COMMANDS
from tools.check.wheel import ROOT, build_wheel, copy_checkout, install, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("wheel") / "checkout")


@pytest.fixture(scope="module")
def wheel(checkout):
    return build_wheel(checkout, checkout.parent / "dist")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("environment"))


def test_the_wheel_has_one_package_and_the_recipes_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megatron_dagger"}
    recipes = {f"megatron_dagger/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    assert recipes <= set(names)
    assert "megatron_dagger/py.typed" in names


def test_a_wheel_of_the_source_distribution_is_the_same(checkout, wheel, tmp_path):
    with tarfile.open(build_wheel(checkout, tmp_path / "sdist", "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    [source] = (tmp_path / "source").iterdir()
    rebuilt = build_wheel(source, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_every_command_explains_itself(environment, tmp_path):
    program = environment / "megatron-dagger"
    assert "COMMAND" in run(program, "--help", cwd=tmp_path)
    for name in COMMANDS:
        assert f"megatron-dagger {name}" in run(program, name, "--help", cwd=tmp_path)


def test_recipes_and_plan_work(environment, tmp_path):
    program = environment / "megatron-dagger"
    assert "qwen3_8b_swegym_8h100" in run(program, "recipes", cwd=tmp_path)
    assert "8 x h100" in run(program, "plan", "qwen3_8b_swegym_8h100", cwd=tmp_path)


@pytest.mark.parametrize("name", ["recipes", "tools", "tests"])
def test_no_other_module_is_installed_beside_the_package(environment, tmp_path, name):
    assert f"No module named '{name}'" in run(environment / "python", "-c", f"import {name}", cwd=tmp_path, expected=1)
