"""A trainer of many ranks over one ledger: rank 0 plans, every rank fetches its own rollouts.

See :func:`connect_ranks`; docs/batches.md says how it works.
"""

from rollfleet.ranks.collective import Collective, Solo
from rollfleet.ranks.connecting import connect_ranks
from rollfleet.ranks.rank_batch import RankBatch
from rollfleet.ranks.rank_fleet import RankFleet
from rollfleet.ranks.redis_collective import RedisCollective

__all__ = ["Collective", "RankBatch", "RankFleet", "RedisCollective", "Solo", "connect_ranks"]
