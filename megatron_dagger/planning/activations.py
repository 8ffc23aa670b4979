"""The activations that a rank keeps for the backward passes of its micro-batches, and what those passes add.

The tables in ``saved_tensors`` give the bytes of a layer, the pipeline's schedule the number of micro-batches in
flight; the last stage adds logits.
"""

from __future__ import annotations

from megatron_dagger.config.model import ModelConfig, padded_vocab_size
from megatron_dagger.config.training import TrainingConfig
from megatron_dagger.planning.saved_tensors import FP32, SavedTensor, Split, itemsize, layer_tensors


def layer_bytes(model: ModelConfig, training: TrainingConfig, *, te: bool, expert_load: float = 1.0) -> float:
    """Return the bytes that one layer keeps of one micro-batch on one rank between forward and backward pass."""
    if training.recompute == "full":
        return training.sequence_length * _layer_input(model, training).per_rank(training)
    recomputed = set(training.recompute_modules) if training.recompute == "selective" else set()
    tensors = layer_tensors(model, training, te=te, expert_load=expert_load)
    return training.sequence_length * sum(t.per_rank(training) for t in tensors if not recomputed & set(t.modules))


def recomputed_bytes(model: ModelConfig, training: TrainingConfig, *, te: bool, expert_load: float = 1.0) -> float:
    """Return the bytes that the backward pass of one layer recomputes; only one of its modules runs at a time."""
    if training.recompute == "none":
        return 0.0
    tensors = layer_tensors(model, training, te=te, expert_load=expert_load)
    if training.recompute == "selective":
        of_modules = [[t for t in tensors if module in t.modules] for module in training.recompute_modules]
        sizes = (sum(t.per_rank(training) for t in of_module) for of_module in of_modules)
        return training.sequence_length * max(sizes, default=0.0)
    per_token = sum(t.per_rank(training) for t in tensors)
    if te or training.precision == "fp32":  # kept already: the norm's input is the layer's input
        per_token -= _layer_input(model, training).per_rank(training)
    return training.sequence_length * per_token


def gradient_bytes(model: ModelConfig, training: TrainingConfig, *, expert_load: float = 1.0) -> float:
    """Return the bytes of the gradients that exist at once in the MLP's backward pass, the widest part of a layer.

    They are the gradients of down's input, of gate and up, of the layer's output and of the norm's output; sequence
    parallelism gathers the last of these over the ranks, together with the norm's output itself. With experts they
    are the gradients of the dispatched tokens at the experts' input and, twice while ranks exchange them, at their
    output; the gradients of the layer's output are then split over the ranks.
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
    """Return the largest number of layers, counted once per micro-batch, whose activations a stage holds.

    1F1B: stage i of p has min(p - i, m) micro-batches in flight (Narayanan et al., arXiv 2104.04473, section
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


def head_bytes(model: ModelConfig, training: TrainingConfig, label_tokens: int, *, te: bool) -> float:
    """Return the bytes that the last stage's norm and the output layer's input keep."""
    saved = (2 if te else 2 * FP32) * model.hidden_size
    norm = SavedTensor(name="last norm", bytes=saved, split=Split.SEQUENCE).per_rank(training)
    size = itemsize(training)
    if training.parallel.sequence_parallel:
        return training.sequence_length * (
            norm + size * model.hidden_size / training.parallel.tensor_model_parallel_size
        )
    return training.sequence_length * norm + label_tokens * size * model.hidden_size


def logits_bytes(model: ModelConfig, training: TrainingConfig, positions: int, *, kept: bool) -> float:
    """Return the bytes of the logits of ``positions`` tokens on one rank.

    Megatron's vocabulary-parallel cross-entropy keeps the softmax in fp32 and computes in place. In BF16 the logits,
    and then their gradient, are added (``tensor_parallel/cross_entropy.py``), and with sequence parallelism the
    gathered input of the output layer. With ``kept``, return only what autograd holds.
    """
    tp = training.parallel.tensor_model_parallel_size
    columns = padded_vocab_size(model, tp) // tp
    masked = padded_vocab_size(model, tp) != model.vocab_size  # a masked copy: padding gets no probability
    size = itemsize(training)
    if kept:
        return positions * columns * FP32
    beside = size if (masked or training.precision != "fp32") else 0
    gathered = size * model.hidden_size if training.parallel.sequence_parallel else 0
    return positions * (columns * (FP32 + beside) + gathered)


def _layer_input(model: ModelConfig, training: TrainingConfig) -> SavedTensor:
    return SavedTensor(name="layer's input", bytes=itemsize(training) * model.hidden_size, split=Split.SEQUENCE)
