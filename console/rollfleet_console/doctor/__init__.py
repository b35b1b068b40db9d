"""`rollfleet doctor`: checks of a live run."""
