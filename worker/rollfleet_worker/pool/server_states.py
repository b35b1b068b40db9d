"""Where one inference server stands, as a state machine: every move is drawn here, and no other is made.

                 answered              failed               gave up
    STARTING -------------> SERVING ----------> SUSPECT -----------> DEAD
                            ^    ^                 |                   |
                     proven |    | current         | answered          | answered
                            |    |                 v                   |
                            +----|-------------- TRIAL <---------------+
                                 |                 ^
                                 |                 | current
                            REFITTING <----------- STALE
                                          refit

    SERVING, TRIAL             --refit-----> REFITTING
    SERVING, TRIAL, REFITTING  --outdated--> STALE
    TRIAL --failed--> SUSPECT;  STARTING --gave up--> DEAD

    all of these           --drain---> DRAINING --undrain--> STARTING
    all of these, DRAINING --remove--> REMOVED (closed once nothing of ours runs there)

- Two things put a server out: its own failing (SUSPECT, DEAD) and what the trainer says of its
  weights (REFITTING, STALE). Whoever is out for the one reason is not judged by the other; on the way
  back both are asked.
- STARTING, SUSPECT and DEAD are left by a probe; REFITTING and STALE by the trainer's next row. A refit
  that went well lets a server in at once, because this happens at every version; from all else the way
  back is a trial.
- Only SERVING and TRIAL are sent anything new. Nothing here knows a clock, a socket or a lock.
"""

from collections.abc import Mapping
from enum import StrEnum

__all__ = ["COMING", "IN", "MOVES", "PROBED", "Event", "ServerState", "step"]


class ServerState(StrEnum):
    """Where a server stands."""

    #: Added: it has not answered yet, or the trainer has not refitted it yet.
    STARTING = "starting"
    SERVING = "serving"
    #: Failing: out until a probe says otherwise, with a backoff.
    SUSPECT = "suspect"
    #: Back: a share of the usual load, until a call succeeds.
    TRIAL = "trial"
    #: Failing for so long that only a slow probe is left.
    DEAD = "dead"
    #: The trainer is at it.
    REFITTING = "refitting"
    #: It does not hold the run's weights.
    STALE = "stale"
    #: An operator takes it out: what runs there ends.
    DRAINING = "draining"
    REMOVED = "removed"


class Event(StrEnum):
    """What can happen to a server."""

    #: A probe found it well.
    ANSWERED = "answered"
    #: A call succeeded, or its trial went by without complaint.
    PROVEN = "proven"
    #: It failed, or hung.
    FAILED = "failed"
    #: It has not answered for too long.
    GAVE_UP = "gave up"
    #: The trainer says that it is being refitted.
    REFIT = "refit"
    #: It holds weights of the run, as the trainer says; or nobody refits servers in this run.
    CURRENT = "current"
    #: It does not.
    OUTDATED = "outdated"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    REMOVE = "remove"


_S, _E = ServerState, Event
_OUT = {_E.DRAIN: _S.DRAINING, _E.REMOVE: _S.REMOVED}

#: The drawing as a table; a pair that is not in it changes nothing.
MOVES: Mapping[ServerState, Mapping[Event, ServerState]] = {
    _S.STARTING: {_E.ANSWERED: _S.SERVING, _E.GAVE_UP: _S.DEAD, **_OUT},
    _S.SERVING: {
        _E.FAILED: _S.SUSPECT,
        _E.REFIT: _S.REFITTING,
        _E.OUTDATED: _S.STALE,
        **_OUT,
    },
    _S.SUSPECT: {_E.ANSWERED: _S.TRIAL, _E.GAVE_UP: _S.DEAD, **_OUT},
    _S.TRIAL: {
        _E.PROVEN: _S.SERVING,
        _E.FAILED: _S.SUSPECT,
        _E.REFIT: _S.REFITTING,
        _E.OUTDATED: _S.STALE,
        **_OUT,
    },
    _S.DEAD: {_E.ANSWERED: _S.TRIAL, **_OUT},
    _S.REFITTING: {_E.CURRENT: _S.SERVING, _E.OUTDATED: _S.STALE, **_OUT},
    _S.STALE: {_E.CURRENT: _S.TRIAL, _E.REFIT: _S.REFITTING, **_OUT},
    _S.DRAINING: {_E.UNDRAIN: _S.STARTING, _E.REMOVE: _S.REMOVED},
    _S.REMOVED: {},
}

#: States in which a server is sent something new.
IN = frozenset({_S.SERVING, _S.TRIAL})
#: States in which it is, or will be again soon: worth waiting for without complaint.
COMING = IN | {_S.REFITTING}
#: States that a probe ends.
PROBED = frozenset({_S.STARTING, _S.SUSPECT, _S.DEAD})


def step(state: ServerState, event: Event) -> ServerState:
    """Where `event` takes a server that is in `state`; `state` itself if no arrow is drawn."""
    return MOVES[state].get(event, state)
