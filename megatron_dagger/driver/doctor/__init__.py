"""Examine a machine for a run before its first hour: what will not work, and the way out."""

from megatron_dagger.driver.doctor.checks import CHECKS
from megatron_dagger.driver.doctor.examination import Examination, Finding, examine

__all__ = ["CHECKS", "Examination", "Finding", "examine"]
