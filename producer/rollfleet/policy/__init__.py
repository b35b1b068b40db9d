"""Staleness policies, their order of batches, and the metrics of their bias."""
