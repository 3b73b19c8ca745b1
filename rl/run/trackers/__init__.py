"""Trackers: where a run's metrics go beside metrics.jsonl. docs/trackers.md has the settings and the contract."""
