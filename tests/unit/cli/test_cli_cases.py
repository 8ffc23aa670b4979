"""What users type, right and wrong, and what must come back."""

import pytest

pytest.importorskip("zarr")

from tools.check.cli_cases import CASES, problem_of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_command_line_answers(case):
    assert problem_of(case) == ""


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)
