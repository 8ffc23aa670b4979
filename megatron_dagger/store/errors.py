"""Errors of the store. All are ValueErrors whose message names the path and what to do."""

from __future__ import annotations


class StoreError(ValueError):
    """The store cannot do what was asked."""


class SealedRoundError(StoreError):
    """The round is sealed and takes no more episodes."""


class BrokenEpisodeError(StoreError):
    """An episode that an infrastructure failure ended was offered as data."""


class CorruptDataError(StoreError):
    """The data read from the disk differs from the data that was committed."""
