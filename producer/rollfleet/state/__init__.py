"""What a trainer knows of its run, without I/O."""
