"""The aggregated dataset of a run (zarr v3, append-only, sealed by manifests), and the run directory's durable files.

zarr loads lazily: everything here imports without it.
"""
