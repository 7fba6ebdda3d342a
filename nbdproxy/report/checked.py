"""One state of a disk, on one screen: does it mount, what does the journal change, fsck, files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nbdproxy.oracles.check import Findings, Verdict, merge
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.examine import Examination, Fsck
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.owners import Owner
from nbdproxy.printable import printable
from nbdproxy.sizes import size_text

PATHS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class CheckedFilesystem:
    """One filesystem; `owners` are those of the replayed bytes."""

    name: str
    examination: Examination
    owners: tuple[Owner, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found; `findings` is None without files. `doubt` is of the manifest itself.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     checked = case.check(StateChoice(at="seq:0"), fsck=False)
    >>> [one.examination.mounts for one in checked.filesystems], checked.verdict.value
    ([True], 'fail')
    """

    name: str
    filesystems: tuple[CheckedFilesystem, ...]
    findings: Findings | None
    doubt: str | None = None

    @property
    def verdict(self) -> Verdict:
        """Pass only if all mount, fsck is clean where it was to be run, and all files are whole."""
        found = [_of(one.examination.mounts) for one in self.filesystems]
        checks = [one.examination.fsck for one in self.filesystems]
        found += [_of(fsck.clean) for fsck in checks if isinstance(fsck, Fsck)]
        if self.findings is not None:
            found.append(self.findings.verdict)
        return merge(found)


def lines(told: Checked, *, list_files: bool) -> Iterator[str]:
    """Yield the screen."""
    yield told.name
    for one in told.filesystems:
        if len(told.filesystems) > 1:
            yield f"  {one.name}"
        yield from _filesystem(one)
    if told.findings is None:
        return
    conditions = told.findings.conditions
    counts = Counter(conditions.values())
    said = ", ".join(f"{n:,} {condition.value}" for condition, n in counts.most_common())
    yield f"  files    {said or f'cannot be told: {told.findings.reason}'}"
    if said and told.findings.reason:
        yield f"           {told.findings.reason}"
    if told.doubt:
        yield f"           {told.doubt}"
    if list_files:
        for path, condition in conditions.items():
            if condition is not Condition.WHOLE:
                yield f"           {condition.value:<14} {printable(path)}"


def _filesystem(one: CheckedFilesystem) -> Iterator[str]:
    """Yield what is to be said of one filesystem."""
    found = one.examination
    yield f"  mounts   {_mounts(found)}"
    yield f"  journal  {_journal(one)}"
    if isinstance(found.fsck, str):
        yield f"  fsck     not run: {found.fsck}"
    elif found.fsck.clean is None:
        yield f"  fsck     cannot be told: {found.fsck.said}"
    elif found.fsck.clean:
        yield "  fsck     clean"
    else:
        first, *rest = found.fsck.said.splitlines() or ["it failed"]
        yield f"  fsck     {first}"
        yield from (f"           {line}" for line in rest)


def to_json(told: Checked, *, list_files: bool) -> dict[str, object]:
    """Return what `lines` says, and the extents; one filesystem stands at the top."""
    files = told.findings
    result: dict[str, object] = {"of": told.name, "verdict": told.verdict.value}
    if len(told.filesystems) == 1:
        result |= _filesystem_json(told.filesystems[0])
    else:
        result["filesystems"] = [
            {"name": one.name, **_filesystem_json(one)} for one in told.filesystems
        ]
    if files is not None:
        counts = Counter(condition.value for condition in files.conditions.values())
        result["files"] = {
            "verdict": files.verdict.value,
            "reason": files.reason,
            "conditions": dict(counts.most_common()),
            "doubt": told.doubt,
        }
        if list_files:
            result["lost"] = {
                path: condition.value
                for path, condition in files.conditions.items()
                if condition is not Condition.WHOLE
            }
    return result


def _filesystem_json(one: CheckedFilesystem) -> dict[str, object]:
    found = one.examination
    fsck: Mapping[str, object]
    if isinstance(found.fsck, str):
        fsck = {"run": False, "reason": found.fsck}
    elif found.fsck.clean is None:
        fsck = {"run": False, "clean": None, "reason": found.fsck.said}
    else:
        fsck = {"run": True, "clean": found.fsck.clean, "said": found.fsck.said}
    return {
        "mounts": found.mounts,
        "reason": found.reason,
        "replayed": [
            {"offset": o.extent.offset, "length": o.extent.length, "what": o.words()}
            for o in one.owners
        ],
        "fsck": fsck,
    }


def _of(answer: bool | None) -> Verdict:
    return {True: Verdict.PASS, False: Verdict.FAIL, None: Verdict.UNKNOWN}[answer]


def _mounts(found: Examination) -> str:
    if found.mounts:
        return "yes"
    return f"no: {found.reason}" if found.mounts is False else f"cannot be told: {found.reason}"


def _journal(told: CheckedFilesystem) -> str:
    """Say what the replay changes, by kind."""
    if not told.examination.mounts:
        return "not replayed"
    if not told.owners:
        return "replay changes nothing"
    kinds: dict[str, tuple[int, dict[str, None]]] = {}
    for owner in told.owners:
        length, paths = kinds.setdefault(owner.kind.value, (0, {}))
        paths |= dict.fromkeys(owner.paths)
        kinds[owner.kind.value] = length + owner.extent.length, paths
    total = sum(extent.length for extent in told.examination.replayed)
    if set(kinds) == {OwnerKind.UNKNOWN.value}:
        return f"the mount changes {size_text(total)}, its log's own blocks among them"
    parts = [f"{kind} {size_text(n)}{_named(list(paths))}" for kind, (n, paths) in kinds.items()]
    return f"replay changes {size_text(total)}: {', '.join(parts)}"


def _named(paths: list[str]) -> str:
    if not paths:
        return ""
    more = f" and {len(paths) - PATHS_SHOWN:,} more" if len(paths) > PATHS_SHOWN else ""
    return f" ({', '.join(map(printable, paths[:PATHS_SHOWN]))}{more})"
