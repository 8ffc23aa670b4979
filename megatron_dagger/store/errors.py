"""What can be wrong with a store. All are ValueErrors: the message names the path and the way out."""

from __future__ import annotations


class StoreError(ValueError):
    """The store cannot do what was asked."""


class SealedRoundError(StoreError):
    """The round is sealed: it takes no more episodes."""


class BrokenEpisodeError(StoreError):
    """An episode that shows what broke, not what the policies did, was offered as data."""


class CorruptDataError(StoreError):
    """What the disk gave back is not what was committed."""
