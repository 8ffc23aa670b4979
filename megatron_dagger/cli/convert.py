"""Converts and compares checkpoints: Hugging Face (safetensors) and Megatron-Core (torch_dist).

    megatron-dagger convert hf-to-megatron Qwen3-8B out/megatron --tensor-parallel 4 --dtype bfloat16
    megatron-dagger convert megatron-to-hf runs/quickstart/rounds/0002/train/checkpoint out/hf --files runs/quickstart/student
    megatron-dagger convert reshard out/megatron out/tp8 --tensor-parallel 8 --pipeline-parallel 2
    megatron-dagger convert verify out/megatron Qwen3-8B
    megatron-dagger convert inspect out/megatron
    megatron-dagger convert gguf-to-hf SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2

Memory is that of a few tensors, whatever the size of the model; only gguf-to-hf holds all of it, in float32.
A conversion appears under its name when it is whole; the same command again goes on with one that was
interrupted, and begins anew if the source or a setting is another. Tokenizer and other small files are carried
along; an optimizer's state is not. No code from a checkpoint is run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_dagger.config import ConfigError, ModelConfig, to_dict  # noqa: E402
from megatron_dagger.observability.progress import track  # noqa: E402
from megatron_dagger.store import atomic  # noqa: E402
from megatron_dagger.store.errors import StoreError  # noqa: E402
from megatron_dagger.store.resumable import fingerprint, unfinished  # noqa: E402
from megatron_dagger.weights import families  # noqa: E402
from megatron_dagger.weights.checkpoints import HF_FILES, MARKER, Checkpoint, MegatronFiles, open_checkpoint  # noqa: E402
from megatron_dagger.weights.errors import CheckpointReadError, WeightMapError  # noqa: E402
from megatron_dagger.weights.hf_files import CONFIG, carry_along, write_hf  # noqa: E402
from megatron_dagger.weights.layouts import SourceLayout, padded_vocab_size  # noqa: E402
from megatron_dagger.weights.torch_dist.reader import parameters  # noqa: E402
from megatron_dagger.weights.torch_dist.writer import write_megatron  # noqa: E402
from megatron_dagger.weights.verify.digest import canonical_digests  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except (CheckpointReadError, WeightMapError, ConfigError, StoreError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


def hf_to_megatron(given: argparse.Namespace) -> int:
    return _to_megatron(given, open_checkpoint(given.source), given.files or given.source)


def reshard(given: argparse.Namespace) -> int:
    source = open_checkpoint(given.source, _model(given))
    code = _to_megatron(given, source, given.files or given.source / HF_FILES)
    if isinstance(source, MegatronFiles) and source.weights.has_optimizer:
        print("the optimizer's state was left out: a training from these weights begins at step 0")
    return code


def gguf_to_hf(given: argparse.Namespace) -> int:
    """Transformers reads, dequantises and renames; tokenizer and chat template are in the file too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(given.source.parent), "gguf_file": given.source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model, tensors = ModelConfig.from_hf(loaded.config.to_dict()), loaded.state_dict()
    names = families.canonical_names(model)
    with _output(given) as folder:
        with _counted(tensors.__getitem__, len(names), "writing") as read:
            write_hf(folder, model, read, given.dtype or "float32", most_bytes=given.shard_mib << 20)
        AutoTokenizer.from_pretrained(**where).save_pretrained(str(folder))
    print(f"wrote {given.target}: {len(names)} tensors")
    return 0


def megatron_to_hf(given: argparse.Namespace) -> int:
    source = open_checkpoint(given.source, _model(given))
    dtype = given.dtype or source.dtype()
    total = len(families.canonical_names(source.model))
    with _output(given) as folder:
        with _counted(source.read, total, "writing") as read:
            write_hf(folder, source.model, read, dtype, most_bytes=given.shard_mib << 20)
        files = given.files or given.source / HF_FILES
        if files.is_dir():
            carry_along(files, folder)
    print(f"wrote {given.target}: {total} tensors in {dtype}")
    return 0


def verify(given: argparse.Namespace) -> int:
    """Compare tensor by tensor: 0 if all are equal, 1 if not."""
    one = open_checkpoint(given.source, _model(given))
    other = open_checkpoint(given.target, _model(given))
    ours, theirs = families.canonical_names(one.model), families.canonical_names(other.model)
    if ours != theirs:
        apart = sorted(ours.items() ^ theirs.items())[:5]
        print(f"different models: {apart}")
        return 1
    differing = 0
    with _counted(lambda name: _difference(name, one, other), len(ours), "comparing") as difference_of:
        for name in ours:
            difference = difference_of(name)
            if difference:
                differing += 1
                print(f"{name}: {difference}")
    print(f"{len(ours) - differing} of {len(ours)} tensors are equal, bit for bit")
    return int(differing > 0)


def inspect(given: argparse.Namespace) -> int:
    source = open_checkpoint(given.source, _model(given))
    model = source.model
    print(f"{given.source}: {type(source).__name__}, {model.family}, {parameters(model):,} weights in {source.dtype()}")
    for name, value in to_dict(model).items():
        print(f"  {name} = {value}")
    for name, shape in families.canonical_names(model).items():
        digest = ""
        if given.digests:
            digest = canonical_digests([(name, source.read(name))], model)[name].rpartition(" ")[2]
        print(f"{name:<60} {'x'.join(map(str, shape)):>16} {math.prod(shape):>14,} {digest}".rstrip())
    return 0


def _to_megatron(given: argparse.Namespace, source: Checkpoint, files: Path) -> int:
    model, dtype = source.model, given.dtype or source.dtype()
    layout = SourceLayout(
        padded_vocab_size=padded_vocab_size(model, given.tensor_parallel),
        tensor_model_parallel_size=given.tensor_parallel,
        pipeline_model_parallel_size=given.pipeline_parallel,
        data_parallel_size=given.expert_parallel,
        expert_model_parallel_size=given.expert_parallel,
    )
    table = families.lookup(model)

    def build(name: str) -> Any:
        entry = table.layouts(model)[name]
        parts = {part.name: source.read(part.name) for part in entry.parts}
        return table.from_canonical(name, parts, model, padded_rows=layout.padded_vocab_size if entry.padded else None)

    total = len(table.layouts(model))
    with _output(given) as folder:
        with _counted(build, total, "writing") as read:
            write_megatron(folder, model, read, layout, dtype, most_bytes=given.shard_mib << 20)
        if files.is_dir():
            carry_along(files, folder / HF_FILES)
        (folder / HF_FILES).mkdir(exist_ok=True)
        atomic.write_json(folder / HF_FILES / CONFIG, model.hf_config() | {"torch_dtype": dtype})
        atomic.write_json(folder / MARKER, _marker(model))
    print(f"wrote {given.target}: {total} tensors in {dtype}")
    return 0


def _marker(model: ModelConfig) -> dict[str, Any]:
    """As our trainer's checkpoints have it (``training.checkpoint.CheckpointState``): before the first step."""
    return {
        "step": 0,
        "round_index": 0,
        "seed": 0,
        "weight_version": 0,
        "fingerprint": "converted",
        "model": to_dict(model),
        "megatron_core": "",
    }


def _difference(name: str, one: Checkpoint, other: Checkpoint) -> str:
    import torch

    a, b = one.read(name), other.read(name)
    if a.dtype == b.dtype and torch.equal(a, b):
        return ""
    largest = float((a.double() - b.double()).abs().max())
    dtypes = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}, "
    return f"{dtypes}largest difference {largest:.3g}"


@contextmanager
def _counted(read: Callable[[str], Any], total: int, what: str) -> Iterator[Callable[[str], Any]]:
    """``read``, each call of which is progress."""
    with track(what, total, unit="tensors") as tracker:

        def counted(name: str) -> Any:
            result = read(name)
            tracker.advance()
            return result

        yield counted


def _output(given: argparse.Namespace) -> AbstractContextManager[Path]:
    """Where to write what becomes ``given.target``; all other arguments decide what that is."""
    settings = {name: value for name, value in vars(given).items() if name not in ("run", "target")}
    job = {name: fingerprint(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return unfinished(given.target, {"command": given.run.__name__, **job})


def _model(given: argparse.Namespace) -> ModelConfig | None:
    if given.model is None:
        return None
    return ModelConfig.from_hf(json.loads(given.model.read_text()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, model=None)
        sub.add_argument("source", type=Path, help="a checkpoint's directory (a GGUF file for gguf-to-hf)")
        return sub

    def writes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("target", type=Path, help="the directory to write; it must not exist")
        sub.add_argument("--dtype", choices=DTYPES, help="default: as in the source")
        sub.add_argument("--files", type=Path, help="where tokenizer and other small files are; default: the source")
        sub.add_argument("--shard-mib", type=int, default=4096, help="size of a file, about (default %(default)s)")

    def parallel(sub: argparse.ArgumentParser) -> None:
        for name in ("tensor", "pipeline", "expert"):
            text = f"{name}-parallel size whose ranks will read it in one piece (any other can read it too)"
            sub.add_argument(f"--{name}-parallel", type=int, default=1, help=text)

    def model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", type=Path, help="a config.json, for a Megatron checkpoint that has none with it")

    sub = command("hf-to-megatron", hf_to_megatron, "write a Megatron checkpoint of a Hugging Face one")
    writes(sub)
    parallel(sub)
    sub = command("megatron-to-hf", megatron_to_hf, "write safetensors, index and config.json of a Megatron checkpoint")
    writes(sub)
    model(sub)
    text = "write a Megatron checkpoint in the chunks of another layout: the weights, not the optimizer's state"
    sub = command("reshard", reshard, text)
    writes(sub)
    parallel(sub)
    model(sub)
    sub = command("gguf-to-hf", gguf_to_hf, "write a GGUF file, dequantised in memory, as a Hugging Face checkpoint")
    writes(sub)
    sub = command("verify", verify, "compare two checkpoints of any kind, tensor by tensor; exit code 1 if they differ")
    sub.add_argument("target", type=Path, help="the other checkpoint")
    model(sub)
    sub = command("inspect", inspect, "say what is in a checkpoint, without loading it")
    sub.add_argument("--digests", action="store_true", help="with the digest of every tensor, which reads it")
    model(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
