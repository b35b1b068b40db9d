"""rollfleet: what a trainer imports."""
