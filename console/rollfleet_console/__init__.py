"""The `rollfleet` command: worker, status, demo."""
