"""Rollouts to tensors: collation, packing and micro-batches."""
