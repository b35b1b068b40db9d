"""The pool of inference servers: membership, routing, limits, ejection and resuming."""
