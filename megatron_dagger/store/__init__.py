"""The aggregated dataset: zarr v3, append-only, sealed by manifests, digests. zarr loads lazily."""
