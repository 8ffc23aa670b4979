"""What can go wrong between the trainer's weights and the engine's."""

from __future__ import annotations


class CheckpointReadError(ValueError):
    """A Megatron checkpoint is missing, incomplete, damaged, or not to be trusted."""


class WeightMapError(ValueError):
    """A tensor has a name or a shape that the model family does not know, or cannot be cut as asked."""


class WeightSyncError(RuntimeError):
    """The engine did not take over exactly the weights that the trainer wrote."""
