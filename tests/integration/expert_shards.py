"""A rank of a trainer with experts that packs all blocks it would send to an engine (``python -m``, from ``launch``).

Rank 0 assembles the engine's tensors from the blocks, and compares their digests with those of the trainer's memory.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dagger.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dagger.training import digests, weight_export
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.ranks.process_groups import process_groups
from megatron_dagger.weights.blocks import Shard
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.transfer_plan import plan
from megatron_dagger.weights.transports import TransferSpec, WeightSource
from megatron_dagger.weights.transports.pack import Packer
from megatron_dagger.weights.verify.digest import digest_shares, merge
from tests.unit.weights.sample_models import sample_model

LAYOUTS = (
    {"expert_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
)


def main() -> None:
    model = sample_model("qwen3_moe", kv_channels=16, num_query_groups=2, vocab_size=131)
    for layout in LAYOUTS:
        check(model, ParallelConfig(world_size=2, **layout))


def check(model: ModelConfig, parallel: ParallelConfig) -> None:
    training = TrainingConfig(parallel=parallel, sequence_length=256, global_batch_tokens=512)
    layout, target = SourceLayout.of_trainer(model, parallel), TargetLayout()
    with process_groups(parallel, seed=1, timeout_s=60, threads=1) as device:
        engine = MegatronEngine(model, training, seed=5, device=device)
        in_memory = digests.parameter_digests(engine.chunks, model)
        source = WeightSource(kind="shared_memory", address="unused", layout=layout, bucket_mib=1, deadline_s=1)
        pack = Packer(
            TransferSpec(model=model, target=target, dtype="float32", source=source), weight_export.own_tensors(engine)
        )
        sent = []
        for copy in plan(model, layout, target).by_source[dist.get_rank()]:
            values = torch.empty(copy.target.shape)
            pack(copy, values)
            sent.append((copy.target_parameter, copy.target, values))
        gathered: list[list] = [[], []]
        dist.all_gather_object(gathered, sent)
    parameters = lookup(model).vllm(model)
    received = {name: torch.full(entry.shape(Shard()), torch.nan) for name, entry in parameters.items()}
    for name, box, values in gathered[0] + gathered[1]:
        received[name][box.slices] = values
    shares = [digest_shares(entry.blocks(Shard()), received[name], model) for name, entry in parameters.items()]
    assert merge(shares, model) == in_memory, parallel


if __name__ == "__main__":
    main()
