"""Weight updates: inference servers are made to serve the policy's newest version.

One file for each concern: `control` speaks HTTP, `drivers` know the engines, `one` refits a server,
`fleet` all of them, `healer` those that fell behind, `saving` writes what they load.
"""
