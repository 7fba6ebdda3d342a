"""`check`: the condition of each file of a manifest on a block device.

Never a false verdict: *pass* means that every file was read, through a filesystem that a kernel
would mount, and has the right digest; *fail* that at least one is certainly not whole; everything
else is *unknown*, with the reason. On a device without any filesystem the verdict is unknown as
well: only the caller knows whether there should be one.

`filesystems` says which filesystems are read here, and which need a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles import manifest as manifests
from nbdproxy.oracles import partitions
from nbdproxy.oracles.condition import Condition, classify
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.ext4.filesystem import HOLES_MAX
from nbdproxy.oracles.filesystems import (
    NAMES,
    Mounted,
    N,
    kind_of,
    open_filesystem,
)
from nbdproxy.oracles.globs import Matcher, no_file
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import ONLY, Mount, PartitionName
from nbdproxy.oracles.partitions import Slice
from nbdproxy.oracles.resolutions import resolve


class Verdict(StrEnum):
    """What an oracle says; merged, fail beats unknown beats pass."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Findings:
    """What a check found.

    verdict     of all files together
    conditions  by path; empty if the filesystem as a whole could not be judged
    reason      why the verdict, or the first file's, is unknown; or, where all files are lost, what
                a kernel said that did not mount the filesystem
    """

    verdict: Verdict
    conditions: dict[str, Condition] = field(default_factory=dict)
    reason: str | None = None


class PartlyListedError(FilesystemError):
    """Some folders of a filesystem cannot be listed; `paths` are those of all other files."""

    def __init__(self, broken: str, paths: list[str]) -> None:
        """Keep what could be listed, and say which folder could not."""
        super().__init__(f"{broken}: it cannot be listed or read")
        self.paths = paths


class FileCheck(NamedTuple):
    """The condition of one file; `doubt` is the reason of CANNOT_BE_TOLD."""

    condition: Condition
    doubt: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict on this file alone."""
        if self.condition is Condition.WHOLE:
            return Verdict.PASS
        is_known = self.condition is not Condition.CANNOT_BE_TOLD
        return Verdict.FAIL if is_known else Verdict.UNKNOWN


_OUTCOMES = {condition: FileCheck(condition) for condition in Condition}
MISSING = _OUTCOMES[Condition.MISSING]
"""One object for all missing files, of which there may be millions."""


def merge(verdicts: Collection[Verdict]) -> Verdict:
    """Return fail if any fails, else unknown if any is unknown, else pass."""
    for verdict in (Verdict.FAIL, Verdict.UNKNOWN):
        if verdict in verdicts:
            return verdict
    return Verdict.PASS


def check(
    device: ReadableDevice,
    manifest: Manifest,
    *,
    earlier: Mapping[str, Collection[str]] | None = None,
    mount: Mount = ONLY,
) -> Findings:
    """Tell the condition of every file of `manifest` on `device`.

    `earlier` maps a path to the digests of its earlier versions; `mount` says which filesystem has
    the files. A manifest of relative paths is resolved against this very device; resolve it once
    against a good state with `locate` if many are checked. Raises ManifestError only if that
    fails. Whatever else goes wrong, even inside this oracle, is the verdict *unknown*.
    """
    try:
        filesystem = opened(device, mount)
        if not all(path.startswith("/") for path in manifest.paths()):
            manifest = resolve(manifest, _paths(filesystem))
        return _check(filesystem, manifest, earlier or {})
    except ManifestError:
        raise
    except FilesystemError as error:
        return Findings(Verdict.UNKNOWN, reason=str(error))
    except Exception as error:  # a crashed oracle must never look like a verdict
        return Findings(
            Verdict.UNKNOWN,
            reason=f"the oracle failed on this state ({type(error).__name__}: {error}); "
            f"ask with --oracle kernel",
        )


def scan(
    device: ReadableDevice,
    under: str = "/",
    *,
    mount: Mount = ONLY,
    modes: bool = False,
    without: Matcher = no_file,
) -> Manifest:
    """Describe a mount's regular files and symbolic links below `under`, with `modes` if wanted.

    Files of the paths that `without` means are not read.
    Hard links appear under each of their names, symbolic links are not followed. Raises
    FilesystemError if there is no filesystem or several, if the state cannot be judged, at the
    first file that cannot be read, and where the files are longer together than a disk can hold.
    """
    filesystem = opened(device, mount)
    entries = []
    digests: dict[int, str] = {}
    left = HOLES_MAX + 2 * filesystem.device.size
    for path, node in filesystem.walk(absolute(under), without=lambda path: without(shown(path))):
        name = shown(path)
        try:
            if node.is_symlink:
                target = shown(filesystem.symlink_target(node))
                entries.append(manifests.link_entry(name, target))
                continue
            if node.number not in digests:
                left -= node.size
                if left < 0 and not filesystem.is_endless(node):
                    raise UnsupportedError(
                        "with this one the files are far longer than the disk; name the folders "
                        "of the others with --under, or leave some out with --exclude"
                    )
                digests[node.number] = manifests.digest(filesystem.chunks(node))
        except FilesystemError as error:
            raise FilesystemError(f"{name}: {error}") from error
        mode = node.mode & manifests.PERMISSIONS if modes else None
        entries.append(Entry(name, digests[node.number], node.size, mode))
    return Manifest(tuple(entries))


def opened(device: ReadableDevice, mount: Mount) -> Mounted[Any]:
    """Return the filesystem of a mount; raises FilesystemError if there is none to be read."""
    return open_filesystem(only(candidates(device, mount.partition)).device, mount)


def paths(device: ReadableDevice, *, mount: Mount = ONLY) -> list[str]:
    """Return the paths of all files and links; raises FilesystemError as `scan` does.

    Raises PartlyListedError if some can be listed.
    """
    broken: list[bytes] = []
    found = [shown(path) for path, _ in opened(device, mount).walk(broken=broken)]
    if broken:
        raise PartlyListedError(shown(broken[0] or b"/"), found)
    return found


def outcome(entry: Entry, judge: Callable[[], Condition]) -> FileCheck:
    """Return what `judge` returns, or what its CorruptError or UnsupportedError means."""
    try:
        return _OUTCOMES[judge()]
    except CorruptError:
        return _OUTCOMES[Condition.UNREADABLE]
    except UnsupportedError as error:
        return FileCheck(Condition.CANNOT_BE_TOLD, f"{entry.path}: {error}")


def condition_of(
    filesystem: Mounted[N], node: N | None, entry: Entry, earlier: Collection[str]
) -> Condition:
    """Tell the condition of a file whose path leads to `node`.

    Raises CorruptError or UnsupportedError if its content cannot be read.
    """
    if node is None:
        return Condition.MISSING
    if entry.target is not None and node.is_symlink:
        target = filesystem.symlink_target(node)
        return classify(entry, len(target), [target], earlier)
    if entry.target is not None or not node.is_regular:
        return Condition.DAMAGED
    if entry.size is None and node.size > filesystem.device.size:
        raise UnsupportedError("sparse and larger than its disk; give its size in the manifest")
    if entry.size not in {None, node.size} and filesystem.is_endless(node):
        earlier = ()  # another size is a loss, whatever else it is
    found = classify(entry, node.size, filesystem.chunks(node), earlier)
    is_other = entry.mode not in {None, node.mode & manifests.PERMISSIONS}
    return Condition.DAMAGED if found is Condition.WHOLE and is_other else found


def absolute(path: str) -> bytes:
    """Return a manifest's path as the filesystem spells it, from the root."""
    return b"/" + path.encode("utf-8", "surrogateescape").lstrip(b"/")


def candidates(device: ReadableDevice, partition: PartitionName) -> list[Slice]:
    """Return the parts of a disk that may hold the filesystem, or the one that was named.

    Raises FilesystemError if there is none.
    """
    found = partitions.slices(device)
    if partition is not None:
        chosen = [part for part in found if partition in {part.number, part.key}]
        if not chosen:
            there = ", ".join(str(part.number) for part in found)
            what = "partition" if isinstance(partition, int) else "volume"
            if len(found) == 1:
                raise FilesystemError(
                    f"there is no {what} {partition}: in this state the disk has no partition "
                    f"table; 0 is the whole disk"
                )
            raise FilesystemError(f"there is no {what} {partition}; choose one of {there}")
        return chosen
    with_filesystem = [part for part in found if kind_of(part.device) is not None]
    if not with_filesystem:
        known = ", ".join(NAMES.values())
        raise FilesystemError(
            f"no filesystem found: neither the disk nor any of its partitions begins with {known}"
        )
    return with_filesystem


def _check(
    filesystem: Mounted[Any], manifest: Manifest, earlier: Mapping[str, Collection[str]]
) -> Findings:
    conditions: dict[str, Condition] = {}
    verdicts = set()
    reason = None
    for entry in manifest.entries:
        found = outcome(entry, partial(_judged, filesystem, entry, earlier.get(entry.path, ())))
        conditions[entry.path] = found.condition
        verdicts.add(found.verdict)
        reason = reason or found.doubt
    return Findings(merge(verdicts), conditions, reason)


def _judged(filesystem: Mounted[Any], entry: Entry, earlier: Collection[str]) -> Condition:
    node = filesystem.lookup(absolute(entry.path), follow_last=entry.target is None)
    return condition_of(filesystem, node, entry, earlier)


def _paths(filesystem: Mounted[Any]) -> list[str]:
    return [shown(path) for path, _ in filesystem.walk()]


def shown(path: bytes) -> str:
    """Return a filesystem's path as a manifest spells it."""
    return path.decode("utf-8", "surrogateescape")


def only(found: list[Slice], *, or_mount: bool = False) -> Slice:
    """Return the one of them; raises FilesystemError if there are several.

    With `or_mount` the message names --mount as well.
    """
    if len(found) > 1:
        more = ", or say what is mounted where with --mount" if or_mount else ""
        raise FilesystemError(
            f"several partitions hold a filesystem: {_listed(found)}; "
            f"name one of them with --partition{more}"
        )
    return found[0]


def _listed(found: list[Slice]) -> str:
    return ", ".join(
        f"{part.number} ({part.name}, {part.length} bytes at {part.offset})" for part in found
    )
