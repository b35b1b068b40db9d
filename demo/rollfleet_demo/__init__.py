"""The main job: a small transformer learns a verifiable task through the whole fleet."""
