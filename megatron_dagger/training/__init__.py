"""Training on Megatron-Core: model, parallel layout, packing, loss, optimizer, checkpoints, launch.

Nothing is imported here: ``job``, ``packing``, ``batches``, ``schedule`` and ``launch`` need no torch.
"""

import os
import sys

from megatron_dagger.gpus import has_gpus

if not has_gpus(os.environ):
    # Megatron decorates functions with torch.compile on import, which on the CPU compiles for about ten
    # seconds and gains nothing. Read when torch._dynamo is imported, so it must be set before Megatron is.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Where these are installed Megatron takes their optimizers and kernels, which run on a GPU only.
    for _name in ("transformer_engine", "apex"):
        sys.modules.setdefault(_name, None)  # type: ignore[arg-type]  # importing it is an ImportError
