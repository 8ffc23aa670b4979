"""The GPUs that a process may use, and the drivers that forbid forking ranks."""

from types import SimpleNamespace

import pytest

from megatron_dagger.config import ConfigError
from megatron_dagger.gpus import any_driver, check_torch, has_gpus, visible_gpus


def test_the_environment_limits_the_visible_gpus(tmp_path):
    assert visible_gpus({}, tmp_path) is None and not has_gpus({}, tmp_path), "without a driver there are no GPUs"
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1", "nvidia10"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 3 and has_gpus({}, tmp_path)
    two = {"CUDA_VISIBLE_DEVICES": "2,GPU-4f7a"}
    assert visible_gpus(two, tmp_path) == 2 and has_gpus(two, tmp_path)
    for none in ("", "-1", "NoDevFiles"):  # the last is SLURM's
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": none}, tmp_path) is None
    assert not has_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)


def test_the_driver_of_any_vendor_is_detected(tmp_path):
    assert not any_driver(tmp_path)
    (tmp_path / "kfd").touch()
    assert any_driver(tmp_path)


def torch_of(cuda, *, works=False):
    available = SimpleNamespace(is_available=lambda: works)
    return SimpleNamespace(__version__="2.14.0", version=SimpleNamespace(cuda=cuda), cuda=available)


@pytest.mark.parametrize("needed", [True, False])
def test_gpus_that_torch_cannot_use_are_an_error(tmp_path, needed):
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "nvidia0").touch()
    with pytest.raises(ConfigError, match=r"built for CUDA 13\.0 and cannot use them: the driver"):
        check_torch(torch_of("13.0"), {}, needed=needed, devices=tmp_path)
    check_torch(torch_of("13.0", works=True), {}, needed=needed, devices=tmp_path)
    for hidden in ("", "-1", "NoDevFiles"):
        check_torch(torch_of("13.0"), {"CUDA_VISIBLE_DEVICES": hidden}, needed=needed, devices=tmp_path)


def test_a_build_for_the_cpu_is_an_error_where_a_gpu_is_needed(tmp_path):
    check_torch(torch_of(None), {}, needed=True, devices=tmp_path)  # no GPU
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "nvidia0").touch()
    check_torch(torch_of(None), {}, needed=False, devices=tmp_path)
    with pytest.raises(ConfigError, match="built for the CPU: use an environment with CUDA"):
        check_torch(torch_of(None), {}, needed=True, devices=tmp_path)
