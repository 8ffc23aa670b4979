"""What a rank keeps of its micro-batches for their backward passes, and what is there besides while these last.

Layers by the tables in ``saved``; which of them are under way at a time by the pipeline's schedule; logits.
"""

from __future__ import annotations

from megatron_dagger.config.model import ModelConfig, padded_vocab_size
from megatron_dagger.config.training import TrainingConfig
from megatron_dagger.planning.saved_tensors import FP32, SavedTensor, Split, itemsize, layer_tensors


def layer_bytes(model: ModelConfig, training: TrainingConfig, *, engine: bool, expert_load: float = 1.0) -> float:
    """What one layer keeps of one micro-batch on one rank between its forward and its backward pass."""
    if training.recompute == "full":
        return training.sequence_length * _layer_input(model, training).here(training)
    again = set(training.recompute_modules) if training.recompute == "selective" else set()
    tensors = layer_tensors(model, training, engine=engine, expert_load=expert_load)
    return training.sequence_length * sum(t.here(training) for t in tensors if not again & set(t.modules))


def recomputed_bytes(model: ModelConfig, training: TrainingConfig, *, engine: bool, expert_load: float = 1.0) -> float:
    """What the backward pass of one layer makes again, while it lasts; of its modules one is at work at a time."""
    if training.recompute == "none":
        return 0.0
    tensors = layer_tensors(model, training, engine=engine, expert_load=expert_load)
    if training.recompute == "selective":
        of_modules = [[t for t in tensors if module in t.modules] for module in training.recompute_modules]
        return training.sequence_length * max((sum(t.here(training) for t in made) for made in of_modules), default=0.0)
    made = sum(t.here(training) for t in tensors)
    if engine or training.precision == "fp32":  # kept already: the norm's input is the layer's
        made -= _layer_input(model, training).here(training)
    return training.sequence_length * made


def gradient_bytes(model: ModelConfig, training: TrainingConfig, *, expert_load: float = 1.0) -> float:
    """The gradients that are there at once in the MLP's backward pass, the widest part of a layer.

    Those of down's input, of gate and up, of the layer's output and of the norm's output, which sequence
    parallelism gathers over the ranks together with the norm's output itself. Of experts, those of the dispatched
    tokens at their input and, twice while ranks exchange them, at their output; the layer's are cut then.
    """
    size, parallel = itemsize(training), training.parallel
    tp, hidden = parallel.tensor_model_parallel_size, model.hidden_size
    if model.num_moe_experts is not None:
        copies = model.moe_router_topk * (expert_load if parallel.expert_model_parallel_size > 1 else 1.0)
        inner = 3 * copies * (model.moe_ffn_hidden_size or 0)
        outer = (3 * copies * parallel.expert_tensor_parallel_size + 2) * hidden
        return training.sequence_length * size * (inner + outer) / tp
    wide = 3 * model.ffn_hidden_size / tp
    whole = (2 if parallel.sequence_parallel else 1) * hidden
    return training.sequence_length * size * (wide + whole + hidden)


def in_flight_layers(model: ModelConfig, training: TrainingConfig, stage: int) -> int:
    """Layers, counted once per micro-batch, whose activations a stage holds at most.

    1F1B: stage i of p has min(p - i, m) micro-batches under way (Narayanan et al., arXiv 2104.04473, section
    2.2.1). Interleaved with v chunks: 2 (p - i - 1) + (v - 1) p + 1 chunks, at most m v (section 2.2.2 and
    ``get_pp_rank_microbatches`` in Megatron-Core's schedules).
    """
    parallel, micro_batches = training.parallel, training.micro_batches
    stages = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return model.num_layers
    if virtual == 1:
        return min(stages - stage, micro_batches) * (model.num_layers // stages)
    chunks = 2 * (stages - stage - 1) + (virtual - 1) * stages + 1
    return min(chunks, micro_batches * virtual) * (model.num_layers // (stages * virtual))


def head_bytes(model: ModelConfig, training: TrainingConfig, label_tokens: int, *, engine: bool) -> float:
    """What the last stage's norm and the output layer's input keep."""
    saved = (2 if engine else 2 * FP32) * model.hidden_size
    norm = SavedTensor(name="last norm", bytes=saved, split=Split.SEQUENCE).here(training)
    size = itemsize(training)
    if training.parallel.sequence_parallel:
        return training.sequence_length * (
            norm + size * model.hidden_size / training.parallel.tensor_model_parallel_size
        )
    return training.sequence_length * norm + label_tokens * size * model.hidden_size


def logits_bytes(model: ModelConfig, training: TrainingConfig, positions: int, *, kept: bool) -> float:
    """The logits of ``positions`` tokens on one rank.

    Megatron's vocabulary-parallel cross-entropy keeps the softmax in fp32 and computes in place; in BF16
    the logits themselves, and then their gradient, are there besides (``tensor_parallel/cross_entropy.py``), and
    with sequence parallelism the output layer's input, gathered. ``kept``: only what autograd holds.
    """
    tp = training.parallel.tensor_model_parallel_size
    columns = padded_vocab_size(model, tp) // tp
    masked = padded_vocab_size(model, tp) != model.vocab_size  # a copy: padding gets no probability
    size = itemsize(training)
    if kept:
        return positions * columns * FP32
    beside = size if (masked or training.precision != "fp32") else 0
    gathered = size * model.hidden_size if training.parallel.sequence_parallel else 0
    return positions * (columns * (FP32 + beside) + gathered)


def _layer_input(model: ModelConfig, training: TrainingConfig) -> SavedTensor:
    return SavedTensor(name="layer's input", bytes=itemsize(training) * model.hidden_size, split=Split.SEQUENCE)
