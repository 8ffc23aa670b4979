"""Hugging Face folders as others write them: read rightly, or refused with the reason."""

import json
import os

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

import torch
from safetensors.torch import load_file, save_file

from megatron_dagger.weights import families
from megatron_dagger.weights.checkpoints import open_checkpoint
from megatron_dagger.weights.companions import INDEX, copy_companions
from megatron_dagger.weights.errors import CheckpointReadError
from megatron_dagger.weights.hf_files import HfCheckpoint, write_hf
from megatron_dagger.weights.hf_index import SINGLE, canonical_names
from tests.unit.weights.sample_models import sample_model

MODEL = sample_model("llama", tie_embeddings=False)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in families.canonical_names(MODEL).items()}


@pytest.fixture
def folder(tmp_path, weights):
    """A folder with one file of weights."""
    write_hf(tmp_path, MODEL, weights.__getitem__, "float32")
    return tmp_path


@pytest.fixture
def sharded(tmp_path, weights):
    """A folder with a file for each tensor and an index."""
    write_hf(tmp_path, MODEL, weights.__getitem__, "float32", max_bytes=1)
    return tmp_path


def renamed(folder, rename):
    save_file({rename(name): tensor for name, tensor in load_file(folder / SINGLE).items()}, folder / SINGLE)
    return folder


def assert_read(folder, weights):
    read = dict(HfCheckpoint(folder).canonical_tensors())
    assert list(read) == list(weights)
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
        lambda name: name.replace("model.", "model._fsdp_wrapped_module.", 1),
        lambda name: f"module.{name.replace('.self_attn', '._checkpoint_wrapped_module.self_attn')}",
        lambda name: name.removeprefix("model."),
    ],
)
def test_names_with_the_prefixes_of_other_programs_are_read(folder, weights, rename):
    assert_read(renamed(folder, rename), weights)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.attn.masked_bias",
    ],
)
def test_the_computed_buffers_of_older_checkpoints_are_skipped(folder, weights, name):
    save_file(load_file(folder / SINGLE) | {name: torch.ones(8)}, folder / SINGLE)
    assert_read(folder, weights)


def test_any_other_tensor_is_refused_by_name(folder):
    name = "model.layers.0.self_attn.q_norm.weight"
    save_file(load_file(folder / SINGLE) | {name: torch.ones(8)}, folder / SINGLE)
    with pytest.raises(CheckpointReadError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight"):
        HfCheckpoint(folder)


def test_two_tensors_of_one_name_are_refused(folder):
    save_file(load_file(folder / SINGLE) | {f"_orig_mod.{NORM}": torch.ones(16)}, folder / SINGLE)
    with pytest.raises(CheckpointReadError, match="the same tensor"):
        HfCheckpoint(folder)


def test_several_files_are_read_without_their_index_and_with_one_that_is_out_of_date(sharded, weights):
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).unlink()
    assert_read(sharded, weights)
    names = index["weight_map"]
    first, second, *_ = names
    names[first], names[second] = names[second], names[first]  # each is in the other's file
    (sharded / INDEX).write_text(json.dumps(index))
    assert_read(sharded, weights)
    save_file({"another.format": torch.ones(2)}, sharded / "consolidated.safetensors")
    assert_read(sharded, weights)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda f: edit_index(f, lambda names: names.update(more=names[NORM])), "has 'more', but it does not"),
        (lambda f: edit_index(f, lambda names: names.pop(NORM)), r"missing \['model\.norm\.weight'\]"),
        (lambda f: edit_index(f, lambda names: names.update({NORM: "x.safetensors"})), "'x.safetensors', which does"),
        (lambda f: edit_index(f, lambda names: names.update({NORM: "../x"})), "'../x', which is no file of this"),
        (lambda f: edit_index(f, lambda names: names.update({NORM: "x.bin"})), "only safetensors files are read"),
        (lambda f: edit_index(f, lambda names: names.update({NORM: 3})), "names 3, which is no file"),
        (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object"),
        (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map": '), "cannot be read"),
        (lambda f: (f / INDEX).write_text(POINTER), "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (lambda f: sorted(f.glob("model-*"))[0].write_text(POINTER), "is a Git LFS pointer"),
        (lambda f: os.truncate(sorted(f.glob("model-*"))[0], 40), "is damaged"),
        (lambda f: (f / "config.json").write_text(POINTER), r"config\.json is a Git LFS pointer"),
        (lambda f: [path.unlink() for path in f.glob("model*")], "holds no safetensors file"),
        (
            lambda f: [path.rename(f / "pytorch_model.bin") for path in f.glob("model*")],
            "weights in a pickle, which may run any code and is never read: save them as safetensors",
        ),
        (lambda f: [path.rename(f / "a.gguf") for path in f.glob("model*")], "gguf-to-hf"),
        (
            lambda f: (
                (save_file({}, f / "copy.safetensors"), [p.unlink() for p in f.glob("model*")])
                and [save_file({NORM: torch.ones(1)}, f / f"{n}.safetensors") for n in "ab"]
            ),
            r"a\.safetensors and b\.safetensors both have 'model\.norm\.weight'",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(sharded, damage, why):
    damage(sharded)
    with pytest.raises(CheckpointReadError, match=why):
        open_checkpoint(sharded)


def test_links_to_files_elsewhere_are_followed(folder, weights, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("blobs")
    (folder / SINGLE).rename(elsewhere / "blob")
    (folder / SINGLE).symlink_to(elsewhere / "blob")
    assert_read(folder, weights)
    (elsewhere / "blob").unlink()
    with pytest.raises(CheckpointReadError):
        HfCheckpoint(folder)


def test_a_quantised_tensor_is_refused(folder):
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {NORM: tensors[NORM].to(torch.float8_e4m3fn)}, folder / SINGLE)
    checkpoint = HfCheckpoint(folder)
    with pytest.raises(CheckpointReadError, match=r"'model\.norm\.weight' is stored as F8_E4M3, which is not read"):
        checkpoint.dtype(NORM)


SMALL_FILES = (
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "merges.txt",
)


def test_all_small_files_are_copied_and_no_pointer(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in (*SMALL_FILES, "additional_chat_templates/tools.jinja"):
        (source / name).write_text(name)
    for name in ("model.safetensors", "optimizer.pt", "config.json", INDEX, ".hidden", "pytorch_model.bin.index.json"):
        (source / name).write_text(name)
    copy_companions(source, target)
    copied = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert copied == {name: name for name in (*SMALL_FILES, "additional_chat_templates/tools.jinja")}
    copy_companions(tmp_path / "nowhere", target)
    for name in ("model.ckpt", "model.nemo", "weights.pkl", "modeling_x.py", "x.safetensors.tmp"):
        (source / name).write_text(name)
    (tmp_path / "secret").write_text("mine")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointReadError, match=r"notes\.txt is a link to .*secret, which is not a file of the checkp"
    ):
        copy_companions(source, target)
    (source / "notes.txt").unlink()
    copy_companions(source, target)
    assert len([path for path in target.rglob("*") if path.is_file()]) == len(copied)
    (source / "tokenizer.model").write_text(POINTER)
    with pytest.raises(CheckpointReadError, match=r"tokenizer\.model is a Git LFS pointer"):
        copy_companions(source, target)


def test_names_without_an_embedding_stay_as_they_are():
    names = ["model.embed_tokens.weight", "visual.embed_tokens.weight", "x"]
    assert canonical_names(names) == {name: name for name in names}
