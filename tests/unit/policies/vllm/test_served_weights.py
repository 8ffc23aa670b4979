"""Replacing an engine's weights: the version that is served after each kind of failure."""

import pytest

from megatron_dagger.policies.base import PolicyGone
from megatron_dagger.policies.vllm.served_weights import Broken, Empty, ServedWeights, Serving
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.transports import WeightSource


class ScriptedLoader:
    """Fails to load the versions in ``unreadable`` before it changes a weight, those in ``corrupt`` after."""

    def __init__(self, unreadable=(), corrupt=()):
        self.unreadable, self.corrupt, self.intact, self.loaded = set(unreadable), set(corrupt), False, []

    def load(self, source, version, digests, canary=None):
        self.loaded.append(version)
        if version in self.unreadable:
            raise WeightSyncError("unreadable")
        self.intact = version not in self.corrupt
        if not self.intact:
            raise WeightSyncError("corrupt")

    def accept(self, version, digests, canary=None):
        if version in self.corrupt:
            raise WeightSyncError("corrupt")
        self.intact = True


def serving(version, kind="checkpoint"):
    source = WeightSource(kind=kind, address=f"checkpoint-{version}", layout=SourceLayout(padded_vocab_size=64))
    return Serving(version=version, source=source, digests={"weight": str(version)})


def served_after(engine, *versions, loaded=False, weights=None):
    """Return the state after attempts to serve one version after the other."""
    weights = weights or ServedWeights()
    for version in versions:
        try:
            weights.replace(engine, serving(version), None, loaded=loaded)
        except WeightSyncError:
            continue
    return weights


def test_nothing_is_served_at_first():
    weights = ServedWeights()
    with pytest.raises(PolicyGone, match=r"no weights yet; call sync\(\) first"):
        weights.require_serving()
    assert (weights.state, str(weights), weights.serves(0, {})) == (Empty(), "it does not serve", False)


@pytest.mark.parametrize("loaded", [False, True], ids=["load", "accept"])
def test_a_version_is_served_once_it_is_verified(loaded):
    weights = served_after(ScriptedLoader(), 0, loaded=loaded)
    weights.require_serving()
    assert weights.state == serving(0)
    assert weights.serves(0, {"weight": "0"})
    assert not weights.serves(0, {"weight": "other"})
    assert not weights.serves(1, {"weight": "0"})
    assert served_after(ScriptedLoader(corrupt={"0"}), 0, loaded=loaded).state == Empty()


def test_a_failure_before_a_weight_changed_leaves_the_version_serving():
    engine = ScriptedLoader(unreadable={"1"})
    weights = served_after(engine, 0, 1)
    assert (weights.state, engine.loaded) == (serving(0), ["0", "1"])
    assert str(weights) == "it still serves version 0"


def test_a_failure_after_a_weight_changed_restores_the_previous_version():
    engine = ScriptedLoader(corrupt={"1"})
    weights = served_after(engine, 0, 1)
    assert (weights.state, engine.loaded) == (serving(0), ["0", "1", "0"])


def test_weights_that_cannot_be_restored_are_not_served_until_a_sync_succeeds():
    engine = ScriptedLoader(corrupt={"1"})
    weights = served_after(engine, 0)
    engine.unreadable.add("0")
    served_after(engine, 1, weights=weights)
    assert isinstance(weights.state, Broken)
    with pytest.raises(PolicyGone, match=r"weights are mixed since a sync failed \(corrupt\); sync again"):
        weights.require_serving()
    engine.unreadable.clear()
    served_after(engine, 1, weights=weights)  # fails again, and restores version 0
    assert weights.state == serving(0)
    served_after(engine, 2, weights=weights)
    assert weights.state == serving(2)


def test_a_version_from_a_trainers_memory_cannot_be_restored():
    engine = ScriptedLoader(corrupt={"1"})
    weights = ServedWeights()
    weights.replace(engine, serving(0, "p2p"), None, loaded=False)
    served_after(engine, 1, weights=weights)
    assert (str(weights), engine.loaded) == ("it does not serve", ["0", "1"])
