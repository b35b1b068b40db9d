"""Commands of `rollfleet` with their options."""
