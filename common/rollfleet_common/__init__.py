"""The common floor of rollfleet: what travels, the streams, staleness arithmetic, the task runner."""
