"""The visible side of a run: logs, metrics, progress, status, the report page, and exports of its episodes."""
