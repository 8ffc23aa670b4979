"""The planner's memory against Megatron-Core's model, gradients, optimizer and autograd, measured on the CPU."""

import json
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

from megatron_dagger.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig, to_dict
from megatron_dagger.planning import Assumptions, activations
from megatron_dagger.planning.memory import label_positions, state_bytes
from megatron_dagger.planning.parameters import rank_parameters
from megatron_dagger.training.ranks.launch import launch

REPOSITORY = Path(__file__).resolve().parents[2]
ASSUMED = Assumptions(label_share=0.25)
QWEN3 = ModelConfig(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=320,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=1000,
)
UNTIED = ModelConfig(**{**to_dict(QWEN3), "tie_embeddings": False, "vocab_size": 1024})
LLAMA = ModelConfig(**{**to_dict(QWEN3), "family": "llama", "kv_channels": 16})
QWEN2 = ModelConfig(**{**to_dict(LLAMA), "family": "qwen2"})
MOE = ModelConfig(
    **{
        **to_dict(UNTIED),
        "family": "qwen3_moe",
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 96,
        "moe_router_topk": 2,
    }
)
WORLD = 4


def case(model, tp=1, pp=1, *, distributed=True, micro_batches=2, **training):
    names = ("sequence_parallel", "virtual_pipeline_model_parallel_size", "expert_model_parallel_size")
    layout = {name: training.pop(name) for name in names if name in training}
    parallel = ParallelConfig(
        world_size=WORLD, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **layout
    )
    return model, TrainingConfig(
        parallel=parallel,
        sequence_length=256,
        global_batch_tokens=256 * parallel.data_parallel_size * micro_batches,
        optimizer=OptimizerConfig(distributed=distributed),
        **training,
    )


CASES = {
    "dp4": case(QWEN3),
    "tp2-dp2-bf16": case(QWEN3, tp=2, precision="bf16"),
    "tp4-sp-untied": case(UNTIED, tp=4, sequence_parallel=True),
    "tp2-sp-pp2-untied": case(UNTIED, tp=2, pp=2, sequence_parallel=True, micro_batches=4),
    "pp4-few-rows": case(QWEN3, pp=4, micro_batches=2),
    "pp2-vpp2-dp2": case(QWEN3, pp=2, virtual_pipeline_model_parallel_size=2, micro_batches=4),
    "tp2-llama-bf16-replicated": case(LLAMA, tp=2, precision="bf16", distributed=False),
    "tp2-qwen2-selective": case(QWEN2, tp=2, recompute="selective"),
    "tp2-sp-full": case(QWEN3, tp=2, sequence_parallel=True, recompute="full"),
    "pp2-bf16-full": case(QWEN3, pp=2, precision="bf16", recompute="full", micro_batches=4),
    "moe-ep2-dp4": case(MOE, expert_model_parallel_size=2),
    "moe-tp2-sp-ep4-bf16": case(MOE, tp=2, sequence_parallel=True, expert_model_parallel_size=4, precision="bf16"),
    "moe-pp2-ep2-recomputed": case(
        MOE, pp=2, expert_model_parallel_size=2, recompute="selective", recompute_modules=("moe",), micro_batches=4
    ),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The measurements of each of four ranks, by case."""
    folder = tmp_path_factory.mktemp("measured")
    files = []
    for name, (model, training) in CASES.items():
        files.append(folder / f"{name}.json")
        settings = {"model": to_dict(model), "training": to_dict(training), "label_share": ASSUMED.label_share}
        files[-1].write_text(json.dumps(settings))
    launch(
        ["tests.integration.plan_measure", str(folder), *map(str, files)],
        ParallelConfig(world_size=WORLD),
        folder / "logs",
        300.0,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(WORLD)] for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_parameters_and_state_match_the_trainer(measured, name):
    model, training = CASES[name]
    for stage in range(training.parallel.pipeline_model_parallel_size):
        ranks = [rank for rank in measured[name] if rank["stage"] == stage]
        parameters = rank_parameters(model, training.parallel, stage)
        assert [rank["parameters"] for rank in ranks] == [parameters.total] * len(ranks)
        weights, gradients, optimizer = state_bytes(training, parameters.total, parameters.experts)
        assert {(rank["weights"], rank["gradients"]) for rank in ranks} == {(weights, gradients)}
        # the distributed optimizer's shards differ in size; their mean is exact
        assert sum(rank["optimizer"] for rank in ranks) / len(ranks) == pytest.approx(optimizer, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_activations_match_the_bytes_that_autograd_keeps(measured, name):
    model, training = CASES[name]
    for stage in range(training.parallel.pipeline_model_parallel_size):
        planned = kept_by_autograd(model, training, stage)
        kept = [rank["activations"] for rank in measured[name] if rank["stage"] == stage]
        if training.parallel.expert_model_parallel_size > 1:  # some ranks' experts get more tokens than others'
            kept = [sum(kept) / len(kept)]
        assert [planned] * len(kept) == pytest.approx(kept, rel=0.03), kept


def kept_by_autograd(model, training, stage):
    """Return the planner's peak of the bytes that autograd holds, without gradients and memory fragmentation."""
    kept = activations.in_flight_layers(model, training, stage) * activations.layer_bytes(model, training, te=False)
    recomputed = activations.recomputed_bytes(model, training, te=False)
    if stage < training.parallel.pipeline_model_parallel_size - 1:
        return kept + recomputed
    labels = label_positions(training, ASSUMED)
    head = activations.head_bytes(model, training, labels, te=False)
    return kept + max(recomputed, head + activations.logits_bytes(model, training, labels, kept=True))
