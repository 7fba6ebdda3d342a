"""A policy in force on one disk: its rules, and the stores that it stacks on the export's.

An `Export` has one active policy at a time. What does not depend on the policy (recording,
connections, claims) is the export's.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from nbdproxy.errors import RecordingError
from nbdproxy.policy.engine import Decision, Engine
from nbdproxy.policy.model import Handling, Policy, handling
from nbdproxy.requests import Command, Request
from nbdproxy.server.below.cached_store import CachedStore
from nbdproxy.server.below.faulty_store import FaultyStore, shows_faults
from nbdproxy.server.below.store import Store
from nbdproxy.server.export.places import RulePlaces


class ActivePolicy:
    """`policy` on the store `base`, which the caller owns.

    number  tells it from those that were in force before
    fail    is told of a recording that is full
    store   `base` with what the policy stacks on it
    honest  whether FLUSH and FUA requests make durable what they are to
    """

    def __init__(
        self,
        policy: Policy,
        base: Store,
        *,
        number: int,
        seed: int,
        places: RulePlaces,
        fail: Callable[[RecordingError], None],
    ) -> None:
        self.policy = policy
        self.number = number
        self.seed = seed
        self.engine = Engine(policy, seed, places.of)
        self.honest = handling(policy, Command.FLUSH, 0) is not Handling.ANSWER
        store = base
        if policy.cache.holds:
            store = CachedStore(
                base.disk, policy, base.power, seed=seed, metadata=places.metadata, fail=fail
            )
        self.store = FaultyStore(store, policy) if shows_faults(policy) else store

    @property
    def matched(self) -> dict[str, int]:
        """How often each rule matched."""
        return dict(self.engine.matched)

    def describe(self) -> str:
        """Return what the recording says of the policy in force, as JSON."""
        policy = self.policy
        facts = {"policies": policy.names, "settings": policy.settings, "seed": self.seed}
        return json.dumps(facts)


def fault_note(request: Request, seq: int, decision: Decision) -> str:
    """Return what the recording says of a rule that matched, as JSON."""
    command = Command(request.command).name.lower().replace("_", "-")
    action = decision.action.kind.value if decision.action is not None else "delay"
    facts: dict[str, object] = {
        "rule": decision.draw_key.rule,
        "action": action,
        "command": command,
    }
    if seq >= 0:
        facts["seq"] = seq
    if request.length:
        facts |= {"offset": request.offset, "length": request.length}
    if decision.delay_s:
        facts["delay_s"] = round(decision.delay_s, 6)
    return json.dumps(facts)
