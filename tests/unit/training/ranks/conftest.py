"""Run every test here with forked and with started ranks, and with no module imported in advance."""

import pytest

from megatron_dagger.training.ranks import launch as launch_module


@pytest.fixture(params=["forked", "started"], autouse=True)
def start_method(request, monkeypatch):
    monkeypatch.setattr(launch_module, "_forks", lambda: request.param == "forked")
    monkeypatch.setattr(launch_module, "PRELOAD", ())
    monkeypatch.setattr(launch_module, "_server", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # ranks without a GPU, wherever this runs
    yield request.param
    if launch_module._server is not None:
        launch_module._server.close()
