"""The table of pinned packages."""

import pytest

from megatron_dagger.envs.repo_repair.pinned_packages import PACKAGES, UnknownPackageError, find_package, packages


def test_training_and_heldout_packages_are_disjoint_and_pinned():
    train, heldout = packages(heldout=False), packages(heldout=True)
    assert {p.name for p in train}.isdisjoint(p.name for p in heldout)
    assert len(train) + len(heldout) == len(PACKAGES) == len({p.name for p in PACKAGES})
    for package in PACKAGES:
        assert package.sdist.endswith(f"-{package.version}.tar.gz")
        assert len(package.sha256) == 64


def test_an_unknown_package_is_an_error_with_the_closest_name():
    assert find_package("toolz").version
    with pytest.raises(UnknownPackageError, match="did you mean toolz"):
        find_package("tools")
