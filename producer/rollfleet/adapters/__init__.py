"""Faces for trainers that have their own: PyTorch's DataLoader (`loader`), TRL (`trl`).

Nothing is imported here: each needs libraries that the others do not.
"""

__all__: list[str] = []
