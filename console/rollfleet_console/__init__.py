"""The `rollfleet` command: worker, status, dead letters, demo."""
