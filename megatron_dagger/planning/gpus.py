"""GPUs by name, with the numbers of the vendor's data sheets."""

from __future__ import annotations

from dataclasses import dataclass

# Dense tensor-core peaks in FLOP/s (without sparsity): BF16, and FP8 if the GPU has it. The words of a key are parts
# of the name that CUDA reports; the first match counts. From NVIDIA's data sheets.
TENSOR_PEAKS: dict[str, tuple[float, float | None]] = {
    "H100 PCIe": (756e12, 1513e12),
    "H100 NVL": (835e12, 1671e12),
    "H100": (989e12, 1979e12),
    "H200": (989e12, 1979e12),
    "A100": (312e12, None),
}

DEFAULT_GPU = "h100"  # the kind that a recipe is planned for unless a user names another
ANY_GPU = "any"  # no kind is assumed: memory is not checked


def device_peak(device: str, *, fp8: bool) -> float | None:
    """Return the tensor-core peak in FLOP/s of a GPU by the name that CUDA reports; None if it is not known."""
    for name, (bf16_flops, fp8_flops) in TENSOR_PEAKS.items():
        if all(word in device for word in name.split()):
            return fp8_flops if fp8 else bf16_flops
    return None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. Peaks are dense (without sparsity); ``memory_gib`` is the total memory that CUDA reports."""

    name: str
    memory_gib: float
    bandwidth: float  # bytes/s
    bf16_flops: float  # per second, tensor cores
    fp8_flops: float | None  # None: no FP8
    fp32_flops: float  # without tensor cores

    def flops(self, precision: str) -> float:
        """Return the peak of matrix products in a training precision. Raises ValueError if the GPU lacks it."""
        if precision == "fp32":
            return self.fp32_flops
        if not precision.startswith("fp8"):
            return self.bf16_flops
        if self.fp8_flops is None:
            raise ValueError(f"training.precision={precision}: {self.name} has no FP8; set training.precision=bf16")
        return self.fp8_flops


def _sxm(name: str, *, memory_gib: float, bandwidth: float, fp32_flops: float) -> Gpu:
    bf16_flops, fp8_flops = TENSOR_PEAKS[name.upper()]
    return Gpu(
        name=name,
        memory_gib=memory_gib,
        bandwidth=bandwidth,
        bf16_flops=bf16_flops,
        fp8_flops=fp8_flops,
        fp32_flops=fp32_flops,
    )


# The SXM modules: H100, H200, A100 80GB.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _sxm("h100", memory_gib=79.1, bandwidth=3.35e12, fp32_flops=67e12),
        _sxm("h200", memory_gib=139.7, bandwidth=4.8e12, fp32_flops=67e12),
        _sxm("a100", memory_gib=79.1, bandwidth=2.039e12, fp32_flops=19.5e12),
    )
}
