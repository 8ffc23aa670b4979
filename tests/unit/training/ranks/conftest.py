"""Every test here runs both ways, with ranks forked and started, and with no module imported in advance."""

import pytest

from megatron_dagger.training.ranks import launch as module


@pytest.fixture(params=["forked", "started"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(module, "_forks", lambda: request.param == "forked")
    monkeypatch.setattr(module, "PRELOAD", ())
    monkeypatch.setattr(module, "_server", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # ranks without a GPU, wherever this runs
    yield request.param
    if module._server is not None:
        module._server.close()
