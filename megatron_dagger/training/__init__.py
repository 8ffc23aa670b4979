"""Training on Megatron-Core: model, parallel layout, packing, loss, optimizer, checkpoints, launch.

Nothing is imported here: ``job``, ``packing``, ``batches``, ``schedule`` and ``launch`` need no torch.
"""

import os
import sys

if not os.path.exists("/dev/nvidiactl") or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
    # Megatron decorates functions with torch.compile on import, which on the CPU compiles for about ten
    # seconds and gains nothing. Read when torch._dynamo is imported, so it must be set before Megatron is.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Where these are installed Megatron takes their optimizers and kernels, which run on a GPU only.
    for _name in ("transformer_engine", "apex"):
        sys.modules.setdefault(_name, None)  # type: ignore[arg-type]  # importing it is an ImportError
