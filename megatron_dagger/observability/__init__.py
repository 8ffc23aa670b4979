"""What a run shows of itself: logs, metrics, progress, status, the report page, and exports of its episodes."""
