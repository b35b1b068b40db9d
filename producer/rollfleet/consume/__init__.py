"""From the rollouts stream to settled batches."""
