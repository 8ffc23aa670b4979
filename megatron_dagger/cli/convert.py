"""Convert, reshard, compare and inspect checkpoints of Hugging Face and Megatron-Core.

  megatron-dagger convert hf-to-megatron Qwen3-8B out/megatron --tensor-parallel 4 --dtype bfloat16
  megatron-dagger convert megatron-to-hf RUN/rounds/0002/train/checkpoint out/hf
  megatron-dagger convert reshard out/megatron out/tp8 --tensor-parallel 8 --pipeline-parallel 2
  megatron-dagger convert verify out/megatron Qwen3-8B
  megatron-dagger convert inspect out/megatron
  megatron-dagger convert gguf-to-hf SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2

Formats: safetensors, and Megatron-Core's torch_dist. A conversion needs memory for a few tensors, whatever the size
of the model; only gguf-to-hf holds all of it, in float32. The target appears under its name once it is complete.
Repeating an interrupted command resumes it; with another source or setting it starts again. Each tensor keeps its dtype
unless --dtype is given. Tokenizer, chat template and other small files are copied along, for a run's checkpoint those
of RUN/student. The special token ids are kept; an optimizer's state is not. No code from a checkpoint is run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from megatron_dagger.cli.arguments import CommandParser
from megatron_dagger.config import ConfigError, ModelConfig, to_dict
from megatron_dagger.config.base import require
from megatron_dagger.observability.progress import track
from megatron_dagger.store import atomic
from megatron_dagger.store.errors import StoreError
from megatron_dagger.store.resumable import fingerprint, unfinished
from megatron_dagger.weights import families
from megatron_dagger.weights.checkpoints import HF_FILES, MARKER, Checkpoint, MegatronFiles, open_checkpoint
from megatron_dagger.weights.companions import CONFIG, copy_companions, read_config, token_ids, token_ids_in
from megatron_dagger.weights.errors import CheckpointReadError, WeightMapError
from megatron_dagger.weights.hf_files import write_hf
from megatron_dagger.weights.layouts import SourceLayout, padded_vocab_size
from megatron_dagger.weights.torch_dist.writer import write_megatron

DTYPES = ("float32", "bfloat16", "float16")
STUDENT = "student"  # in a run


def main(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.convert(arguments))
    except (CheckpointReadError, WeightMapError, StoreError, FileExistsError) as error:
        raise ConfigError(str(error)) from error


def hf_to_megatron(arguments: argparse.Namespace) -> int:
    return _to_megatron(arguments, _open(arguments.source))


def reshard(arguments: argparse.Namespace) -> int:
    source = _open(arguments.source, _model(arguments))
    code = _to_megatron(arguments, source)
    if isinstance(source, MegatronFiles) and source.weights.has_optimizer:
        print("the optimizer's state was left out: training from these weights starts at step 0")
    return code


def gguf_to_hf(arguments: argparse.Namespace) -> int:
    """Convert with Transformers, which dequantises and renames tensors; the file has tokenizer and template too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require(arguments.source.is_file(), f"{arguments.source}: no such file; download the checkpoint first")
    source = {"pretrained_model_name_or_path": str(arguments.source.parent), "gguf_file": arguments.source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config, tensors = loaded.config.to_dict() | {"quantization_config": None}, loaded.state_dict()  # dequantised
    model = ModelConfig.from_hf(config)
    names = families.canonical_names(model)
    with _output(arguments) as folder:
        with _counted(tensors.__getitem__, len(names), "writing") as read:
            dtype, max_bytes = arguments.dtype or "float32", arguments.shard_mib << 20
            write_hf(folder, model, read, dtype, max_bytes=max_bytes, entries=token_ids(config))
        AutoTokenizer.from_pretrained(**source).save_pretrained(str(folder))
    print(f"wrote {arguments.target}: {len(names)} tensors")
    return 0


def megatron_to_hf(arguments: argparse.Namespace) -> int:
    source = _open(arguments.source, _model(arguments))
    total = len(families.canonical_names(source.model))
    files, ids = _companions(arguments, source)
    with _output(arguments) as folder:
        with _counted(source.read, total, "writing") as read:
            dtype, max_bytes = arguments.dtype or source.dtype, arguments.shard_mib << 20
            write_hf(folder, source.model, read, dtype, max_bytes=max_bytes, entries=ids)
        copy_companions(files, folder)
    print(f"wrote {arguments.target}: {total} tensors in {arguments.dtype or source.dtype()}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare tensor by tensor. Return 0 if all are equal, 1 if not."""
    first = _open(arguments.source, _model(arguments))
    second = _open(arguments.target, _model(arguments))
    names, second_names = families.canonical_names(first.model), families.canonical_names(second.model)
    if names != second_names:
        print(f"different models: {sorted(names.items() ^ second_names.items())[:5]}")
        return 1
    differing = 0
    with _counted(lambda name: _difference(name, first, second), len(names), "comparing") as difference_of:
        for name in names:
            difference = difference_of(name)
            if difference:
                differing += 1
                print(f"{name}: {difference}")
    print(f"{len(names) - differing} of {len(names)} tensors are equal, bit for bit")
    return int(differing > 0)


def inspect(arguments: argparse.Namespace) -> int:
    source = _open(arguments.source, _model(arguments))
    model = source.model
    kind = type(source).__name__
    print(
        f"{arguments.source}: {kind}, {model.family}, {families.parameter_count(model):,} weights in {source.dtype()}"
    )
    for name, value in to_dict(model).items():
        print(f"  {name} = {value}")
    for name, shape in families.canonical_names(model).items():
        digest = ""
        if arguments.digests:
            from megatron_dagger.weights.verify.digest import canonical_digests  # needs xxhash

            digest = canonical_digests([(name, source.read(name))], model)[name].rpartition(" ")[2]
        print(f"{name:<60} {'x'.join(map(str, shape)):>16} {math.prod(shape):>14,} {digest}".rstrip())
    return 0


def _open(directory: Path, model: ModelConfig | None = None) -> Checkpoint:
    require(directory.is_dir(), f"{directory}: no such directory; download the checkpoint first")
    return open_checkpoint(directory, model)


def _to_megatron(arguments: argparse.Namespace, source: Checkpoint) -> int:
    model, dtype = source.model, arguments.dtype or source.dtype()
    files, ids = _companions(arguments, source)
    layout = SourceLayout(
        padded_vocab_size=padded_vocab_size(model, arguments.tensor_parallel),
        tensor_model_parallel_size=arguments.tensor_parallel,
        pipeline_model_parallel_size=arguments.pipeline_parallel,
        data_parallel_size=arguments.expert_parallel,
        expert_model_parallel_size=arguments.expert_parallel,
    )
    table = families.lookup(model)

    def build(name: str) -> Any:
        entry = table.megatron_tensors(model)[name]
        parts = {part.name: source.read(part.name) for part in entry.parts}
        return table.from_canonical(name, parts, model, padded_rows=layout.padded_vocab_size if entry.padded else None)

    total = len(table.megatron_tensors(model))
    with _output(arguments) as folder:
        with _counted(build, total, "writing") as read:
            write_megatron(
                folder, model, read, layout, arguments.dtype or source.dtype, max_bytes=arguments.shard_mib << 20
            )
        copy_companions(files, folder / HF_FILES)
        (folder / HF_FILES).mkdir(exist_ok=True)
        atomic.write_json(folder / HF_FILES / CONFIG, model.hf_config() | {"torch_dtype": dtype, **ids})
        atomic.write_json(folder / MARKER, _marker(model))
    print(f"wrote {arguments.target}: {total} tensors in {dtype}")
    return 0


def _companions(arguments: argparse.Namespace, source: Checkpoint) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the small files to copy, and the special token ids: the source's, if --files has none."""
    own = _own_companions(source.directory)
    files = arguments.files or own
    return files, token_ids_in(own) | token_ids_in(files)


def _own_companions(checkpoint: Path) -> Path:
    """Return the folder with a checkpoint's small files: it, its HF_FILES, or the student of its run."""
    if (checkpoint / CONFIG).is_file():
        return checkpoint
    *_, rounds, _, train, _ = ("", "", "", *checkpoint.resolve().parts)
    if (rounds, train) == ("rounds", "train") and not (checkpoint / HF_FILES).is_dir():
        run = checkpoint.resolve().parents[3]
        if (run / "config.yaml").is_file():
            return run / STUDENT
    return checkpoint / HF_FILES


def _marker(model: ModelConfig) -> dict[str, Any]:
    """Return the trainer's state before the first step (training.checkpoint.CheckpointState)."""
    return {
        "step": 0,
        "round_index": 0,
        "seed": 0,
        "weight_version": 0,
        "fingerprint": "converted",
        "model": to_dict(model),
        "megatron_core": "",
    }


def _difference(name: str, first: Checkpoint, second: Checkpoint) -> str:
    import torch

    a, b = first.read(name), second.read(name)
    if a.dtype == b.dtype and torch.equal(a, b):
        return ""
    largest = float((a.double() - b.double()).abs().max())
    dtypes = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}, "
    return f"{dtypes}largest difference {largest:.3g}"


@contextmanager
def _counted(read: Callable[[str], Any], total: int, activity: str) -> Iterator[Callable[[str], Any]]:
    """Yield ``read``, with progress shown for each call."""
    with track(activity, total, unit="tensors") as tracker:

        def counted(name: str) -> Any:
            result = read(name)
            tracker.advance()
            return result

        yield counted


def _output(arguments: argparse.Namespace) -> AbstractContextManager[Path]:
    """Return the folder that becomes the target; all other arguments identify the conversion to resume."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("convert", "target")}
    job = {name: fingerprint(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return unfinished(arguments.target, {"command": arguments.convert.__name__, **job})


def _model(arguments: argparse.Namespace) -> ModelConfig | None:
    if arguments.model is None:
        return None
    return ModelConfig.from_hf(read_config(arguments.model))


def add_arguments(parser: CommandParser) -> None:
    commands = parser.nested()

    def command(name: str, convert: Callable[[argparse.Namespace], int], text: str) -> CommandParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(convert=convert, model=None)
        sub.add_argument("source", type=Path, help="a checkpoint's directory (gguf-to-hf: a GGUF file)")
        return sub

    def writes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("target", type=Path, help="the directory to write; it must not exist")
        sub.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: each keeps its own)")
        sub.add_argument(
            "--files", type=Path, help="where the small files are (default: the source, or its RUN/student)"
        )
        sub.add_argument("--shard-mib", type=int, default=4096, help="approximate file size (default: %(default)s)")

    def parallel(sub: argparse.ArgumentParser) -> None:
        for name in ("tensor", "pipeline", "expert"):
            text = f"{name}-parallel size that the chunks are cut for (others can read them too)"
            sub.add_argument(f"--{name}-parallel", type=int, default=1, help=text)

    def model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", type=Path, help="a config.json, for a Megatron checkpoint without one")

    sub = command("hf-to-megatron", hf_to_megatron, "convert a Hugging Face checkpoint to a Megatron checkpoint")
    writes(sub)
    parallel(sub)
    sub = command(
        "megatron-to-hf", megatron_to_hf, "convert a Megatron checkpoint to safetensors, index and config.json"
    )
    writes(sub)
    model(sub)
    text = "rewrite a Megatron checkpoint for another layout: the weights, not the optimizer's state"
    sub = command("reshard", reshard, text)
    writes(sub)
    parallel(sub)
    model(sub)
    sub = command("gguf-to-hf", gguf_to_hf, "convert a GGUF file, dequantised in memory, to a Hugging Face checkpoint")
    writes(sub)
    sub = command("verify", verify, "compare two checkpoints of any kind, tensor by tensor; exit code 1 if they differ")
    sub.add_argument("target", type=Path, help="the other checkpoint")
    model(sub)
    sub = command("inspect", inspect, "print a checkpoint's settings and tensors without loading it")
    sub.add_argument("--digests", action="store_true", help="also print every tensor's digest, which reads the tensors")
    model(sub)
