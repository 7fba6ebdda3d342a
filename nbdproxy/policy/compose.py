"""Puts policies together, in order, with the settings that --set gave for them.

The disk has a volatile cache if one of them has; the power goes at the events of all; each keeps
its rules as a layer of its own. Where two ask for different things that cannot both be, that is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from nbdproxy.errors import PolicyError, UsageError
from nbdproxy.policy.loader import PolicyFile, load
from nbdproxy.policy.model import FlushCovers, Policy, PowerCut, Survivors, VolatileCache
from nbdproxy.policy.parameters import Value, read_value

T = TypeVar("T")

DEFAULT = "passthrough"
"""The policy where none is named."""


def load_all(names: Sequence[str], settings: Sequence[str] = ()) -> Policy:
    """Return the policies of these names or paths as one.

    `settings` are KEY=VALUE or POLICY.KEY=VALUE. Raises PolicyError, or UsageError for a setting
    that cannot be read or placed.
    """
    files = [load(name) for name in names or (DEFAULT,)]
    placed = _place(files, settings)
    policies = [file.with_settings(placed[file.name]) for file in files]
    return replace(compose(policies), settings=tuple(settings))


def compose(policies: Sequence[Policy]) -> Policy:
    """Return several policies as one; a single one is itself."""
    if len(policies) == 1:
        return policies[0]
    names = [name for policy in policies for name in policy.names]
    for name in names:
        if names.count(name) > 1:
            raise PolicyError(f"the policy {name} is there twice; name it once")
    caches = [policy for policy in policies if policy.cache.holds]
    times = [policy.cut.after_s for policy in policies if policy.cut.after_s is not None]
    honest = all(policy.flush_covers is FlushCovers.COMPLETED for policy in policies)
    surviving = [p for p in policies if p.cut.survives is not Survivors.FLUSHED]
    return Policy(
        names=tuple(names),
        summary="; ".join(policy.summary for policy in policies),
        imitates="\n".join(policy.imitates.strip() for policy in policies),
        sources=tuple(source for policy in policies for source in policy.sources),
        cache=_one(
            caches, "cache", lambda p: p.cache, VolatileCache(), plain=VolatileCache(holds=True)
        ),
        flush_covers=FlushCovers.COMPLETED if honest else FlushCovers.NOTHING,
        cut=PowerCut(
            frozenset(event for policy in policies for event in policy.cut.at),
            min(times, default=None),
            _one(surviving, "cut.survives", lambda p: p.cut.survives, Survivors.FLUSHED),
        ),
        layers=tuple(layer for policy in policies for layer in policy.layers),
    )


def _one(
    policies: Sequence[Policy],
    what: str,
    of: Callable[[Policy], T],
    default: T,
    *,
    plain: T | None = None,
) -> T:
    """Return what those policies ask for that say more than `plain`; they must agree."""
    if not policies:
        return default
    found = [policy for policy in policies if of(policy) != plain] or list(policies)
    for other in found[1:]:
        if of(other) != of(found[0]):
            raise PolicyError(
                f"{found[0].name} and {other.name} ask for different things in {what}; "
                "leave one of them out"
            )
    return of(found[0])


def _place(files: Sequence[PolicyFile], settings: Sequence[str]) -> dict[str, dict[str, Value]]:
    """Return each policy's settings; one without a policy's name goes to all that have it."""
    placed: dict[str, dict[str, Value]] = {file.name: {} for file in files}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {setting}: write KEY=VALUE, such as --set window=64K")
        policy, dot, name = key.rpartition(".")
        if dot and policy not in placed:
            raise UsageError(f"--set {setting}: there is no policy {policy} here")
        wanted = [
            file
            for file in files
            if (file.name == policy if dot else any(p.name == name for p in file.parameters))
        ]
        if not wanted:
            raise UsageError(f"--set {setting}: {_known(files, name)}")
        for file in wanted:
            if all(parameter.name != name for parameter in file.parameters):
                raise UsageError(f"--set {setting}: {_known([file], name)}")
            placed[file.name][name] = read_value(text)
    return placed


def _known(files: Sequence[PolicyFile], name: str) -> str:
    known: Mapping[str, list[str]] = {f.name: [p.name for p in f.parameters] for f in files}
    listed = "; ".join(f"{file} has {', '.join(own) or 'none'}" for file, own in known.items())
    return f"there is no parameter {name}: {listed}"
