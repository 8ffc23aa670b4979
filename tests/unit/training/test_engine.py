"""The engine's record of the checkpoint that the weights and moments in memory come from, without a model."""

from pathlib import Path

import pytest

from megatron_dagger.config import ModelConfig, TrainingConfig
from megatron_dagger.training import engine as engine_module
from megatron_dagger.training.engine import MegatronEngine, Moments

CHECKPOINT = Path("checkpoint")


class FakeOptimizer:
    """Takes steps, or skips them."""

    def __init__(self, *, succeeds=True):
        self.succeeds = succeeds
        self.param_groups = []

    def reload_model_params(self, state):
        pass

    def step(self):
        return self.succeeds, 1.0, None


@pytest.fixture
def engine(monkeypatch):
    for name in ("check_model", "load", "save"):
        monkeypatch.setattr(engine_module.checkpoint, name, lambda *args, **kwargs: {})
    monkeypatch.setattr(engine_module.optimizer, "build", lambda *args: FakeOptimizer())
    engine = MegatronEngine.__new__(MegatronEngine)
    engine.model_config, engine.training, engine.chunks = ModelConfig(), TrainingConfig(), []
    engine.optimizer, engine.moments, engine._checkpoint = FakeOptimizer(), Moments.NONE, None
    engine.forward_backward = lambda rows, normaliser: 0.5
    return engine


def test_a_loaded_or_saved_checkpoint_is_held_until_the_next_step(engine):
    assert not engine.holds(CHECKPOINT)
    engine.load(CHECKPOINT, with_optimizer=False)
    assert not engine.holds(CHECKPOINT), "its moments were not loaded"
    engine.load(CHECKPOINT, with_optimizer=True)
    assert engine.holds(CHECKPOINT) and not engine.holds(Path("another"))
    engine.step([], normaliser=1.0, learning_rate=0.1)
    assert engine.moments is Moments.UNSAVED and not engine.holds(CHECKPOINT)
    engine.save(Path("later"), None)
    assert engine.holds(Path("later"))


@pytest.mark.parametrize("stepped", [True, False])
def test_moments_start_from_zero_after_loading_weights_alone(engine, stepped):
    fresh = engine.optimizer
    engine.load(CHECKPOINT, with_optimizer=False)
    assert engine.optimizer is fresh, "there were no moments to discard"
    engine.load(CHECKPOINT, with_optimizer=True)
    if stepped:
        engine.step([], normaliser=1.0, learning_rate=0.1)
    engine.load(CHECKPOINT, with_optimizer=False)
    assert engine.optimizer is not fresh
    assert engine.moments is Moments.NONE


def test_a_skipped_step_is_an_error(engine):
    engine.optimizer = FakeOptimizer(succeeds=False)
    with pytest.raises(RuntimeError, match="skipped a step"):
        engine.step([], normaliser=1.0, learning_rate=0.1)
