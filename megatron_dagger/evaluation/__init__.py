"""Success rates of a run, and grading by SWE-bench's own harness."""
