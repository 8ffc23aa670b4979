"""A program: SWE-bench's harness on tasks as they are, in its mode for negative tests (``skip_patch``).

Its command line counts empty patches as unresolved and never runs them: that would not show that a task's
tests fail without a repair. Takes those options of ``swebench.harness.run_evaluation`` that Harness gives.
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
    given = parser.parse_args()
    harness.resource.setrlimit(harness.resource.RLIMIT_NOFILE, (given.open_file_limit, given.open_file_limit))
    listed = harness.get_predictions_from_file(given.predictions_path, given.dataset_name, "test")
    predictions = {prediction["instance_id"]: prediction for prediction in listed}
    rows = harness.load_instances(given.dataset_name, "test", None, None)
    todo = harness.get_dataset_from_preds(given.dataset_name, "test", [], predictions, given.run_id, False)
    harness.run_instances(predictions, todo, given.max_workers, given.run_id, given.timeout, skip_patch=True)
    harness.make_run_report(predictions, rows, given.run_id)


if __name__ == "__main__":
    main()
