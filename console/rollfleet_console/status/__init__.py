"""`rollfleet status`: one snapshot of a run, and its rendering."""
