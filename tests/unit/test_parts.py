"""Parts by name: ours, those of installed packages, and any by import path."""

import re
import sys

import pytest

from megatron_dagger.config import ConfigError, environment
from megatron_dagger.envs.registry import ENTRY_POINTS, ENVIRONMENTS, find_environment
from megatron_dagger.envs.road import load_environment
from megatron_dagger.parts import import_part
from megatron_dagger.recipes import find_recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory that is not on the path, with a module of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "part_of_mine", raising=False)
    (tmp_path / "part_of_mine.py").write_text("def load(context): ...\n")
    return tmp_path


def test_ours_are_imported_by_name():
    assert sorted(ENVIRONMENTS) == sorted(environment.ENVIRONMENTS), "the settings know the same ones"
    assert find_environment("road") is load_environment
    assert all(callable(find_environment(name)) for name in ENVIRONMENTS)


def test_a_module_in_the_current_directory_is_imported_by_path(here):
    assert find_environment("part_of_mine:load").__name__ == "load"
    (here / "recipe_of_mine.py").write_text("from megatron_dagger.config import RunConfig\nmine = RunConfig\n")
    assert find_recipe("recipe_of_mine:mine")().name == "run"


def test_an_installed_package_names_its_environment(here):
    info = here / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nmine = part_of_mine:load\n")
    sys.path.append(str(here))
    assert find_environment("mine").__name__ == "load"
    with pytest.raises(ConfigError, match="did you mean mine"):
        find_environment("mime")


@pytest.mark.parametrize(
    "name, why",
    [
        (
            "repiar",
            "tasks.kind='repiar' is unknown; did you mean repair? (one of your own is named package.module:function)",
        ),
        ("x" * 30, "there are repair, road, swe"),
        (
            "no_such_module:load",
            "there is no module no_such_module; start from the folder that it is in, set PYTHONPATH",
        ),
        ("megatron_dagger.no_such:load", "there is no module megatron_dagger.no_such"),
        (":load", "write package.module:function"),
        ("..m:load", "write package.module:function"),
        ("megatron_dagger.envs.road:WAY_BACK", "road.py has no function WAY_BACK"),
        ("megatron_dagger.envs.road:lode", "road.py has no function lode"),
        ("megatron_dagger.envs.road:", "write package.module:function"),
    ],
)
def test_a_part_that_is_not_there_is_an_error_with_the_way_out(name, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        find_environment(name)


def test_what_a_module_itself_lacks_is_not_taken_for_the_module(here):
    (here / "part_that_needs.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        import_part("part_that_needs:load", "tasks.kind")
