"""Clients of inference servers behind one protocol: token ids in, token ids and versions out."""
