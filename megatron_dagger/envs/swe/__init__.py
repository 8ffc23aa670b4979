"""Software-engineering tasks in Docker: the data sets of SWE-bench's kind, the agent's tools, the judge."""
