"""Training on Megatron-Core: model, parallel layout, loss, optimizer, checkpoints (see README.md).

Nothing is imported here: ``job``, ``schedule``, ``fingerprint``, ``data`` and ``ranks.launch`` need no torch. On a
machine without a GPU, importing the package hides Transformer Engine and Apex from this process.
"""

import os
import sys

from megatron_dagger.gpus import has_gpus

if not has_gpus(os.environ):
    # Megatron decorates functions with torch.compile, which on the CPU compiles for about ten seconds and gains
    # nothing. torch._dynamo reads the variable on import: it must be set before Megatron is imported.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # If these are installed Megatron uses their optimizers and kernels, which run on a GPU only.
    for _name in ("transformer_engine", "apex"):
        sys.modules.setdefault(_name, None)  # type: ignore[arg-type]  # importing it is an ImportError
