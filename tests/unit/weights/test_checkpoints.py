"""The folders in which programs keep checkpoints, and weights of several precisions."""

import json
import shutil

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from megatron_dagger.cli.main import main
from megatron_dagger.config import ConfigError
from megatron_dagger.weights import families
from megatron_dagger.weights.checkpoints import find_checkpoint, open_checkpoint
from megatron_dagger.weights.errors import CheckpointReadError
from megatron_dagger.weights.hf_files import write_hf
from tests.unit.weights.sample_models import FAMILIES, sample_model
from tools.support.checkpoints import write_checkpoint

MODEL = sample_model("qwen3")


def latest(folder, name):
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{name}\n")


@pytest.mark.parametrize(
    "place, name",
    [
        (".", ""),
        ("iter_0000100", "100"),
        ("iter_0000100", ""),
        ("release", "release"),
        ("weights", ""),
        ("snapshots/0a1b2c", ""),
        ("checkpoint-500", ""),
    ],
)
def test_the_parent_of_a_checkpoint_will_do(tmp_path, place, name):
    write_checkpoint(tmp_path / "all" / place, MODEL) if place != "." else write_checkpoint(tmp_path / "all", MODEL)
    if name:
        latest(tmp_path / "all", name)
        write_checkpoint(tmp_path / "all" / "iter_0000050", MODEL)
    assert open_checkpoint(tmp_path / "all").directory == tmp_path / "all" / place
    assert open_checkpoint(tmp_path / "all" / place).model == MODEL


def test_several_checkpoints_and_none_are_refused_with_what_to_name(tmp_path):
    for step in (50, 100):
        write_checkpoint(tmp_path / "steps" / f"iter_{step:07d}", MODEL)
    with pytest.raises(CheckpointReadError, match=r"holds several checkpoints: name one, such as .*/iter_0000100$"):
        find_checkpoint(tmp_path / "steps")
    for name in ("200", "../x", "²"):
        latest(tmp_path / "steps", name)
        with pytest.raises(CheckpointReadError, match=f"names iteration '{name}', but .* holds no checkpoint"):
            find_checkpoint(tmp_path / "steps")
    (tmp_path / "old" / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    for has_tracker in (False, True):
        if has_tracker:
            latest(tmp_path / "old", "1")
        with pytest.raises(CheckpointReadError, match="Megatron-LM's old format, pickles"):
            find_checkpoint(tmp_path / "old")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(CheckpointReadError, match="holds an adapter, not a model"):
        find_checkpoint(tmp_path / "adapter")
    with pytest.raises(CheckpointReadError, match=r"holds neither \.metadata \(Megatron\) nor config\.json"):
        find_checkpoint(tmp_path)


def convert(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_keeps_its_precision_in_both_directions(tmp_path, family):
    model = sample_model(family, num_query_groups=2)
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in families.canonical_names(model).items()}
    dtypes = {name: "float32" if "norm" in name or "gate.weight" in name else "bfloat16" for name in tensors}
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", model, tensors.__getitem__, dtypes.__getitem__)
    convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    convert("verify", tmp_path / "hf", tmp_path / "back")
    read = dict(open_checkpoint(tmp_path / "back").canonical_tensors())
    assert {name: str(tensor.dtype) for name, tensor in read.items()} == {k: f"torch.{v}" for k, v in dtypes.items()}
    convert("hf-to-megatron", tmp_path / "hf", tmp_path / "one", "--dtype", "bfloat16")
    assert {tensor.dtype for _, tensor in open_checkpoint(tmp_path / "one").canonical_tensors()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ids", [{"eos_token_id": [5, 6], "bos_token_id": 4, "pad_token_id": 5}, {}])
def test_special_token_ids_and_small_files_come_back(tmp_path, family, ids):
    model = sample_model(family)
    write_hf_folder(tmp_path / "hf", model, ids)
    convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron")
    convert("reshard", tmp_path / "megatron", tmp_path / "resharded")
    convert("megatron-to-hf", tmp_path / "resharded", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in config if name.endswith("_token_id") and config[name] is not None} == ids
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"
    # A run's checkpoint has no files of its own: those of the run's student are taken
    run = tmp_path / "run"
    (run / "rounds").mkdir(parents=True)
    (run / "config.yaml").touch()
    shutil.copytree(tmp_path / "megatron", run / "rounds" / "0002" / "train" / "checkpoint")
    shutil.move(run / "rounds" / "0002" / "train" / "checkpoint" / "hf", run / "student")
    convert("megatron-to-hf", run / "rounds" / "0002" / "train" / "checkpoint", tmp_path / "exported")
    for file in ("config.json", "chat_template.jinja"):
        assert (tmp_path / "exported" / file).read_text() == (tmp_path / "back" / file).read_text()
    # Files from elsewhere do not drop the ids, and a Hugging Face folder is resharded with its own
    (tmp_path / "files").mkdir()
    for command in ("hf-to-megatron", "reshard"):
        files = ("--files", tmp_path / "files") if command == "hf-to-megatron" else ()
        convert(command, tmp_path / "hf", tmp_path / command, *files)
        config = json.loads((tmp_path / command / "hf" / "config.json").read_text())
        assert {name: config[name] for name in config if name.endswith("_token_id") and config[name] is not None} == ids
    assert (tmp_path / "reshard" / "hf" / "chat_template.jinja").exists()


def test_a_folder_called_student_beside_a_checkpoint_is_not_its_run(tmp_path):
    write_hf_folder(tmp_path / "student", MODEL, {"eos_token_id": 42})
    write_checkpoint(tmp_path / "teacher", MODEL)
    (tmp_path / "config.json").write_text((tmp_path / "teacher" / "hf" / "config.json").read_text())
    shutil.rmtree(tmp_path / "teacher" / "hf")
    convert("megatron-to-hf", tmp_path / "teacher", tmp_path / "out", "--model", tmp_path / "config.json")
    assert "eos_token_id" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_single_file_counts_more_than_an_index_beside_it(tmp_path):
    names = families.canonical_names(MODEL)
    write_hf(tmp_path, MODEL, lambda name: torch.zeros(names[name]), "float32", max_bytes=1)
    write_hf(tmp_path, MODEL, lambda name: torch.ones(names[name]), "float64")
    tensors = dict(open_checkpoint(tmp_path).canonical_tensors())
    assert all((tensor == 1).all() and tensor.dtype is torch.float64 for tensor in tensors.values())


def write_hf_folder(folder, model, ids):
    folder.mkdir()
    zeros = {name: torch.zeros(shape) for name, shape in families.canonical_names(model).items()}
    write_hf(folder, model, zeros.__getitem__, "float32", entries=ids)
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def test_transformers_stops_at_the_ids_of_an_exported_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    write_hf_folder(tmp_path / "hf", MODEL, {"eos_token_id": [5, 6]})
    convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.generation_config.eos_token_id == [5, 6]


ODD_JSON = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '{"weight_map": {"a": 1}}',
    '{"weight_map": []}',
    '{"model": 3}',
    "\ufeff{}",
    "[" * 9999,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder with an index and a Megatron checkpoint of the same weights."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in families.canonical_names(MODEL).items()}
    (root / "hf").mkdir()
    write_hf(root / "hf", MODEL, tensors.__getitem__, "float32", max_bytes=400)
    convert("hf-to-megatron", root / "hf", root / "megatron")
    return root


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_folder_with_any_damage_is_read_or_refused(folders, tmp_path_factory, data):
    """Whatever the damage is, it is an error of ours that names the folder, and never a crash."""
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(folders / data.draw(st.sampled_from(["hf", "megatron"])), folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(data.draw(st.integers(1, 2))):
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes() if file.is_file() else b""
        place = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["remove", "cut", "byte", "pointer", "folder", "json"])):
            case "remove":
                file.unlink(missing_ok=True)
            case "cut":
                file.write_bytes(content[:place])
            case "byte":
                file.write_bytes(content[:place] + data.draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :])
            case "pointer":
                file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
            case "folder":
                file.unlink(missing_ok=True)
                file.mkdir(exist_ok=True)
            case "json":
                file.write_text(data.draw(st.sampled_from(ODD_JSON)))
        files = [path for path in files if path.is_file()] or files
    try:
        for name, tensor in open_checkpoint(folder).canonical_tensors():
            assert tuple(tensor.shape) == families.canonical_names(MODEL)[name]
    except (CheckpointReadError, ConfigError):
        event("refused")
    else:
        event("read")
