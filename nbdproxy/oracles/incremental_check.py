"""`IncrementalCheck`: judges many states that differ in few blocks.

It gives for every state exactly the findings of `check`. It keeps the blocks that each answer was
made from (the mount's, those of each inode and directory of a path, and of each file's content),
and repeats only answers with a block that changed. `check` does the rest: filesystems that are not
one range of the disk, manifests of relative paths, and states at which this code failed.

Costs about as much as `check` for the first state, and memory for one entry per block of each file.
Not thread-safe; use one for each worker.
"""

from __future__ import annotations

import itertools
import posixpath
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from functools import partial

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import (
    MISSING,
    FileCheck,
    Findings,
    Verdict,
    absolute,
    check,
    condition_of,
    merge,
    outcome,
)
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.inode import Inode
from nbdproxy.oracles.ext4.traced import AnswerKind, CachedError, TracedFilesystem
from nbdproxy.oracles.incremental_mount import IncrementalMount, NotIncrementalError
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import ONLY, Mount
from nbdproxy.oracles.oracle import EarlierDigests
from nbdproxy.oracles.watched import EVERYTHING, RangeSet, ReadRange, WatchedDevice

PENDING_MAX = 4096  # ranges kept for the next update of the mount; those of a few states


class IncrementalCheck:
    """Tells the condition of the same files on one state after the other."""

    def __init__(
        self, manifest: Manifest, *, earlier: EarlierDigests | None = None, mount: Mount = ONLY
    ) -> None:
        """Take what `check` takes."""
        self._manifest = manifest
        self._earlier = earlier or {}
        self._mount = mount
        self._is_absolute = all(path.startswith("/") for path in manifest.paths())
        self._size = -1
        self._incremental_mount = IncrementalMount(mount.partition)
        self._files: _TrackedFiles | None = None
        self._has_mounted = False
        # What changed since the mount was last brought up to date.
        self._pending: list[ReadRange] = []
        self._findings: Findings | None = None
        self._reads: RangeSet | None = EVERYTHING

    @property
    def reads(self) -> RangeSet:
        """The bytes of the disk that the last findings depend on.

        Any state that equals the last one in these has the same findings. Made at the first access,
        in about a millisecond; an object that does not change. Before the first call, and where the
        oracle itself failed, that is everything.
        """
        if self._reads is None:
            assert self._files is not None
            self._reads = self._incremental_mount.reads(self._files.known)
        return self._reads

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        """Tell the condition of every file on `device`.

        `changed` holds every byte in which `device` may differ from the device of the last call;
        None, if anything may. Findings that did not change are the same object again: leave them
        as they are. Raises ManifestError as `check` does.
        """
        if changed is None or device.size != self._size:
            self._forget()
            self._size = device.size
        else:
            now = RangeSet((extent.offset, extent.offset + extent.length) for extent in changed)
            self._pending += now.ranges()
            if len(self._pending) > PENDING_MAX:
                self._pending = _fewer(self._pending)
            if self._findings is not None and not self._is_touched(now):
                return self._findings
        # If anything fails below, nothing of the last state may be used.
        self._findings, self._reads = None, EVERYTHING
        found = self._judge(device)
        if self._reads is not EVERYTHING:
            self._findings = found
        return found

    def _judge(self, device: ReadableDevice) -> Findings:
        try:
            if self._is_absolute:
                return self._follow(device)
        except NotIncrementalError:
            pass
        except FilesystemError as error:
            self._has_mounted = False
            self._reads = self._incremental_mount.reads()
            return Findings(Verdict.UNKNOWN, reason=str(error))
        except Exception:
            self._forget()
            return check(device, self._manifest, earlier=self._earlier, mount=self._mount)
        self._forget()
        watched = WatchedDevice(device)
        found = check(watched, self._manifest, earlier=self._earlier, mount=self._mount)
        if found.conditions:  # else something failed, perhaps for once only
            self._reads = RangeSet(watched.take())
        return found

    def _follow(self, device: ReadableDevice) -> Findings:
        known = () if self._files is None else self._files.known
        moved = self._incremental_mount.update(device, RangeSet(self._pending), known)
        self._pending = []
        files, self._files = self._files, None  # lost if an update fails half-way
        if files is None or moved is None:
            files = _TrackedFiles(
                self._incremental_mount.view, self._manifest, self._earlier, self._mount
            )
        else:
            files.update(moved)
        found = files.findings()
        self._files, self._has_mounted, self._reads = files, True, None
        return found

    def _is_touched(self, changed: RangeSet) -> bool:
        if self._has_mounted and self._files is not None:
            return self._incremental_mount.touched(changed, self._files.known)
        return not self.reads.isdisjoint(changed)

    def _forget(self) -> None:
        self._incremental_mount = IncrementalMount(self._mount.partition)
        self._files = None
        self._has_mounted = False
        self._pending = []
        self._findings, self._reads = None, EVERYTHING


def _fewer(ranges: list[ReadRange]) -> list[ReadRange]:
    """Return fewer ranges that cover all of these; perhaps more bytes, which is always safe."""
    merged = RangeSet(ranges).ranges()
    return merged if 2 * len(merged) <= PENDING_MAX else [(merged[0][0], merged[-1][1])]


class _TrackedFiles:
    """The files of a manifest on a view whose blocks change, with the blocks each depends on.

    A missing directory is looked up once for all files in it: under a negative number in place of a
    file's.
    """

    def __init__(
        self, view: WatchedDevice, manifest: Manifest, earlier: EarlierDigests, mount: Mount
    ) -> None:
        self._filesystem = TracedFilesystem(view, mount)
        self._view = view
        self._entries = manifest.entries
        self._earlier = earlier
        self._paths = list(manifest.paths())
        self._nodes: list[Inode | CachedError | None] = [None] * len(self._paths)
        self._folders: defaultdict[str, array[int]] = defaultdict(lambda: array("Q"))
        for file, path in enumerate(self._paths):
            self._folders[posixpath.dirname(path)].append(file)
        self._missing_directories: dict[int, str] = {}
        there = bytearray(len(self._paths))
        for number, folder in enumerate(self._folders, start=1):
            self._missing_directories[-number] = folder
            for file in self._found(-number):
                there[file] = True
        for file in itertools.compress(range(len(there)), there):
            self._nodes[file] = self._follow(file)
        self._outcomes = [
            self._judge(file) if is_there else MISSING for file, is_there in enumerate(there)
        ]
        self._verdicts = Counter(found.verdict for found in self._outcomes)
        self._findings: Findings | None = None

    @property
    def known(self) -> Collection[int]:
        """The blocks of the view that any answer depends on."""
        return self._filesystem.index.by_block

    def update(self, moved: Iterable[int]) -> None:
        """Judge again the files that depend on any of these blocks of the view."""
        stale_paths, doubtful = self._filesystem.refresh(moved)
        lost = self._missing_directories.keys() & stale_paths
        for file in (stale_paths - lost).union(*map(self._found, lost)):
            node = self._follow(file)
            if node != self._nodes[file]:
                self._nodes[file] = node
                doubtful.add(file)
        for file in doubtful:
            before, now = self._outcomes[file], self._judge(file)
            if now != before:
                self._outcomes[file] = now
                self._verdicts[before.verdict] -= 1
                self._verdicts[now.verdict] += 1
                self._findings = None

    def findings(self) -> Findings:
        """Return the findings; the same object as long as they are the same."""
        if self._findings is None:
            self._findings = Findings(
                merge([verdict for verdict, count in self._verdicts.items() if count]),
                {
                    path: found.condition
                    for path, found in zip(self._paths, self._outcomes, strict=True)
                },
                next((found.doubt for found in self._outcomes if found.doubt is not None), None),
            )
        return self._findings

    def _found(self, number: int) -> Collection[int]:
        """Return the files of a missing directory, if it is there by now."""
        folder = self._missing_directories[number]
        if self._filesystem.resolve(number, absolute(folder)) is None:
            return ()
        self._filesystem.forget(number)
        del self._missing_directories[number]
        return self._folders[folder]

    def _follow(self, file: int) -> Inode | CachedError | None:
        entry = self._entries[file]
        return self._filesystem.resolve(
            file, absolute(entry.path), follow_last=entry.target is None
        )

    def _judge(self, file: int) -> FileCheck:
        entry = self._entries[file]
        earlier = self._earlier.get(entry.path, ())
        self._view.take()
        found = outcome(
            entry, partial(_condition, self._filesystem, self._nodes[file], entry, earlier)
        )
        read = self._filesystem.blocks_of(self._view.take())
        self._filesystem.index.put((AnswerKind.CONTENT, file), read)
        return found


def _condition(
    filesystem: TracedFilesystem,
    node: Inode | CachedError | None,
    entry: Entry,
    earlier: Collection[str],
) -> Condition:
    if isinstance(node, CachedError):
        raise node.error()
    return condition_of(filesystem, node, entry, earlier)
