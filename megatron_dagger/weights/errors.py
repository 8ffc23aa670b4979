"""Errors on the way from the trainer's weights to the engine's."""

from __future__ import annotations


class CheckpointReadError(ValueError):
    """A checkpoint is missing, incomplete, damaged, of another model, or contains code."""


class WeightMapError(ValueError):
    """The model family does not know a tensor's name or shape, or the tensor cannot be sharded as requested."""


class WeightSyncError(RuntimeError):
    """The engine could not take over the weights, or holds other weights than the trainer's."""
