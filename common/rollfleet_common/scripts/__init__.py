"""The atomic steps: ``lua/*.lua``, each called through one typed function of this package.

- :mod:`~rollfleet_common.scripts.run`: the board and the servers of a run.
- :mod:`~rollfleet_common.scripts.trainer`: one partition, fenced by the trainer's token.
- :mod:`~rollfleet_common.scripts.worker`: one partition, guarded by leases.
- :mod:`~rollfleet_common.scripts.reads`: what is where, without writing.
- :mod:`~rollfleet_common.scripts.operator`: repairs that need an administrator's rights.

A function bears the name of its script. It takes a client, the names of the run or of the one partition
that it touches, and named arguments, and returns a typed answer. It makes KEYS of the names, so that

- every key that a script touches is declared, as Dragonfly, ElastiCache and kvrocks demand;
- all keys of a call share a hash tag, as Redis Cluster demands;
- no call has more than :data:`~rollfleet_common.scripts.script.MAX_ARGUMENTS`: longer ones are split.

A trainer whose token is superseded gets :class:`~rollfleet_common.errors.SupersededError`. All other
errors are redis-py's own.
"""

from rollfleet_common.scripts.script import MAX_ARGUMENTS, Script, load, script_texts

__all__ = ["MAX_ARGUMENTS", "Script", "load", "script_texts"]
