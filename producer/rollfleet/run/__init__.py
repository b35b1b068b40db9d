"""A run from its opening: checks, the trainer's lease, recovery, rebuilding after a loss."""
