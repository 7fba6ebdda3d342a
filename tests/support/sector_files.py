"""An oracle for disks so small that a file is a sector.

File `/a` is sector 0, `/b` sector 1, ...; a sector of 0xFE means that no such file is there, and a
digest in the manifest is the byte that the sector should hold. Sector 7 is the superblock: unless
it holds its magic, there is no filesystem.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles.browse import MountBrowser
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.examine import Examination
from nbdproxy.oracles.globs import Matcher, no_file
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName, Tree

ABSENT = 0xFE
MAGIC = 0xEF
PATHS = ["/a", "/b", "/c", "/d", "/e", "/f", "/g"]
TREE = Tree((Mount(partition=2),))
FORMATTED = bytes([ABSENT]) * 512 * 7 + bytes([MAGIC]) * 512


class SectorFiles:
    """An oracle for such disks; sees to it that what changes from state to state is told."""

    checks = 0
    last = b""

    def prepare_check(
        self,
        manifest: Manifest,
        *,
        earlier: Mapping[str, Collection[str]],
        mount: Mount,
    ) -> SectorFiles:
        assert mount.partition == 2
        self.manifest, self.earlier = manifest, earlier
        return self

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        self._compare(device.pread(0, device.size), changed)
        return self.judge(device, self.manifest, self.earlier)

    def _compare(self, content: bytes, changed: Iterable[Extent] | None) -> None:
        if changed is None:
            assert not self.checks
        else:
            told = {at for extent in changed for at in range(extent.offset, extent.end)}
            differs = {
                at
                for at, pair in enumerate(zip(content, self.last, strict=False))
                if len(set(pair)) > 1
            }
            assert differs <= told
        self.last = content
        self.checks += 1

    reads = None

    def roots(self, device: ReadableDevice, partition: PartitionName) -> tuple[str, ...]:
        assert partition == 2 and device.size
        return ("/",)

    def paths(self, device: ReadableDevice, *, mount: Mount) -> list[str]:
        assert mount.partition == 2
        return list(self._files(device))

    def content(self, device: ReadableDevice, entry: Entry, *, mount: Mount) -> bytes | None:
        assert mount.partition == 2
        found = self._files(device).get(entry.path)
        return None if found is None else bytes([int(found)])

    def browse(
        self, device: ReadableDevice, *, mount: Mount
    ) -> AbstractContextManager[MountBrowser]:
        raise NotImplementedError("nobody goes through sectors as files")

    def examine(
        self, device: ReadableDevice, *, partition: PartitionName, fsck: bool = True
    ) -> Examination:
        assert not partition
        checker = "there is none" if fsck else "it was not asked for"
        try:
            self._files(device)
        except FilesystemError as error:
            return Examination(False, str(error), (), checker)
        return Examination(True, None, (), checker)

    def close(self) -> None:
        pass

    def judge(
        self, device: ReadableDevice, manifest: Manifest, earlier: Mapping[str, Collection[str]]
    ) -> Findings:
        try:
            there = self._files(device)
        except FilesystemError as error:
            return Findings(verdict=Verdict.UNKNOWN, conditions={}, reason=str(error))
        conditions: dict[str, Condition] = {}
        for entry in manifest.entries:
            found = there.get(entry.path)
            if found == entry.digest:
                conditions[entry.path] = Condition.WHOLE
            elif found is None:
                conditions[entry.path] = Condition.MISSING
            elif found in earlier.get(entry.path, ()):
                conditions[entry.path] = Condition.STALE
            else:
                conditions[entry.path] = Condition.DAMAGED
        whole = set(conditions.values()) == {Condition.WHOLE}
        return Findings(
            verdict=Verdict.PASS if whole else Verdict.FAIL, conditions=conditions, reason=None
        )

    def scan(
        self,
        device: ReadableDevice,
        under: str,
        *,
        mount: Mount,
        modes: bool = False,
        without: Matcher = no_file,
    ) -> Manifest:
        assert (under, mount.partition, modes) == ("/", 2, False)
        files = self._files(device).items()
        return Manifest(tuple(Entry(p, found, 512) for p, found in files if not without(p)))

    def _files(self, device: ReadableDevice) -> dict[str, str]:
        if device.pread(7 * 512, 1)[0] != MAGIC:
            raise FilesystemError("no filesystem found")
        values = {path: device.pread(i * 512, 1)[0] for i, path in enumerate(PATHS)}
        return {path: str(value) for path, value in values.items() if value != ABSENT}
