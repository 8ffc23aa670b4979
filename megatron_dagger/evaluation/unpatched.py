"""A program that runs SWE-bench's harness without patches, in its mode for negative tests (``skip_patch``).

The harness's own command line never runs an empty patch, so it cannot show that a task's tests fail without a repair.
This program takes the options of ``swebench.harness.run_evaluation`` that Harness passes.
"""

from __future__ import annotations

import argparse


def main() -> None:
    from swebench.harness import run_evaluation as harness

    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("dataset_name", "predictions_path", "run_id"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("max_workers", "timeout", "open_file_limit"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    harness.resource.setrlimit(harness.resource.RLIMIT_NOFILE, (args.open_file_limit, args.open_file_limit))
    listed = harness.get_predictions_from_file(args.predictions_path, args.dataset_name, "test")
    predictions = {prediction["instance_id"]: prediction for prediction in listed}
    rows = harness.load_instances(args.dataset_name, "test", None, None)
    todo = harness.get_dataset_from_preds(args.dataset_name, "test", [], predictions, args.run_id, False)
    harness.run_instances(predictions, todo, args.max_workers, args.run_id, args.timeout, skip_patch=True)
    harness.make_run_report(predictions, rows, args.run_id)


if __name__ == "__main__":
    main()
