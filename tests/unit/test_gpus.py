"""The GPUs that a process may use, and the drivers that forbid forking ranks."""

from megatron_dagger.gpus import any_driver, has_gpus, visible_gpus


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
