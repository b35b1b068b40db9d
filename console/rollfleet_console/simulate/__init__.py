"""`rollfleet simulate`: a fleet on a virtual clock, run by the pacing, groups and policies it has.

- No servers, no Redis, no torch; a run is decided by its scenario and seed alone.
- What decides (pacer, groups, policy, staleness, books) is the fleet's own code; what is modelled
  here is only what makes time pass: lengths, slots, failures, the train step and the update.
"""
