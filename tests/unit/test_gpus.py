from megatron_dagger.gpus import any_driver, has_gpus, visible_gpus


def test_gpus_are_those_that_the_environment_lets_see(tmp_path):
    assert visible_gpus({}, tmp_path) is None and not has_gpus({}, tmp_path), "none is no limit"
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1", "nvidia10"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 3 and has_gpus({}, tmp_path)
    two = {"CUDA_VISIBLE_DEVICES": "2,GPU-4f7a"}
    assert visible_gpus(two, tmp_path) == 2 and has_gpus(two, tmp_path)
    for none in ("", "-1", "NoDevFiles"):  # the last is SLURM's
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": none}, tmp_path) is None
    assert not has_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)


def test_every_vendors_driver_counts_where_ranks_may_not_be_forked(tmp_path):
    assert not any_driver(tmp_path)
    (tmp_path / "kfd").touch()
    assert any_driver(tmp_path)
