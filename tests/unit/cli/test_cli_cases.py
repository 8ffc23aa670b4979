"""Calls of the command line, valid and invalid, and their expected outcomes."""

import pytest

pytest.importorskip("zarr")

from tools.check.cli_case import problem_of
from tools.check.cli_cases import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_call_has_its_expected_outcome(case):
    assert problem_of(case) == ""


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)
