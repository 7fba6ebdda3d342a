"""`KernelOracle`: judges crash states by a real Linux kernel, in a disposable guest.

The part of the disk that holds the filesystem is found here (`oracles.partitions`); it alone is
the guest's disk, so the kernel reads no partition table. It is mounted for writing, as its own
machine would after a reboot; what that writes goes into an overlay that is discarded.

A state that the kernel does not mount has lost all its files, if the disk is at fault (see
`drivers`). Any failure of the guest itself leaves a state *unknown*, and the next one gets a new
guest. NTFS is mounted by ntfs-3g, which replays no log: a state whose log Windows would
replay is unknown. Not thread-safe.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from nbdproxy.checker.browse import BROKEN, GuestBrowser
from nbdproxy.checker.drivers import (
    NO_TIMES,
    READ_ONLY,
    RefusedByKernelError,
    driver_of,
    has_ciphers,
    refusal,
    replays_for_writing_only,
)
from nbdproxy.checker.guest import ANSWER_LIMIT_S, DISK_SIZE, CheckerGuest, GuestError
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.lab.guest.build import Lab, build_lab
from nbdproxy.lab.guest.cache import silent
from nbdproxy.lab.guest.kernel import FILESYSTEM_MODULES
from nbdproxy.lab.guest.tools import PACKAGE_OF
from nbdproxy.oracles import check as quick
from nbdproxy.oracles.check import FileCheck, Findings, Verdict
from nbdproxy.oracles.condition import Condition, classify, conclude
from nbdproxy.oracles.examine import Examination, Fsck
from nbdproxy.oracles.ext4.filesystem import HOLES_MAX
from nbdproxy.oracles.filesystems import FilesystemKind, elsewhere, is_seed, kind_of
from nbdproxy.oracles.fsck import concluded
from nbdproxy.oracles.globs import Matcher, no_file
from nbdproxy.oracles.manifest import SHA256, Entry, Manifest, link_entry
from nbdproxy.oracles.mounts import Mount, PartitionName
from nbdproxy.oracles.oracle import CONTENT_MAX, EarlierDigests
from nbdproxy.oracles.partitions import Slice
from nbdproxy.oracles.watched import RangeSet, WatchedDevice

_ELSEWHERE = "EXDEV"
"""The agent's error code for a path that leads out of its mount."""
_SUBVOLUME = re.compile(r"^ID \d+ gen \d+ .*?\bpath ", re.MULTILINE)
ROOTS_MAX, SNAPSHOTS_MAX = 64, 8
"""Subvolumes of a Btrfs, and snapshots, that `roots` returns at most."""
READ_RATE = 4 << 20
"""Bytes per second that a guest reads and digests at least, in software emulation."""


class KernelOracle:
    """An `Oracle`; the guest is booted when it is first needed, and ends with `close`."""

    def __init__(self, progress: Callable[[str], None] = silent) -> None:
        self._progress = progress
        self._lab: Lab | None = None
        self._guest: CheckerGuest | None = None
        self._known: dict[int, Manifest] = {}

    def prepare_check(
        self, manifest: Manifest, *, earlier: EarlierDigests, mount: Mount
    ) -> KernelCheck:
        """Return the check of a manifest's files; its paths are absolute, all on one mount."""
        return KernelCheck(self, manifest, earlier, mount)

    def roots(self, device: ReadableDevice, partition: PartitionName) -> tuple[str, ...]:
        """Return the directories that a mount of a filesystem may show at its point.

        Of Btrfs the default subvolume, the top level, other subvolumes and the topmost snapshots,
        each by its path from the top level; that some were left out is told as progress. Raises
        FilesystemError if it does not mount.
        """
        place = self.place(device, partition)
        if kind_of(place.device) is not FilesystemKind.BTRFS:
            return ("/",)
        roots, left_out = self._subvolumes(place)
        if left_out:
            count = len(roots) + len(left_out)
            self._progress(f"checker: {len(left_out)} of {count} subvolumes are not looked at")
        return tuple(roots)

    def paths(self, device: ReadableDevice, *, mount: Mount) -> list[str]:
        """Return the paths of a mount's files and links.

        Of the top level of a Btrfs without those in subvolumes that `roots` leaves out. Raises
        PartlyListedError if the kernel cannot list or read some.
        """
        place = self.place(device, mount.partition)
        if mount.root == "/" and kind_of(place.device) is FilesystemKind.BTRFS:
            _, left_out = self._subvolumes(place)
            points = [seen for path in left_out if (seen := mount.outside(path)) is not None]
            mount = replace(mount, covered=(*mount.covered, *points))
        return [entry.path for entry in self._walk(place, mount, "/", digests=False)]

    def scan(
        self,
        device: ReadableDevice,
        under: str,
        *,
        mount: Mount,
        modes: bool = False,
        without: Matcher = no_file,
    ) -> Manifest:
        """Describe a mount's files below a directory.

        Raises FilesystemError at the first file that cannot be read.
        """
        place = self.place(device, mount.partition)
        entries = self._walk(place, mount, under, digests=True, without=without)
        if not (modes and driver_of(place.device).keeps_modes):
            entries = [replace(entry, mode=None) for entry in entries]
        return Manifest(tuple(entries))

    def content(self, device: ReadableDevice, entry: Entry, *, mount: Mount) -> bytes | None:
        """Return what a file holds, or where a symbolic link points; None if none is there."""
        try:
            place = self.place(device, mount.partition)
            with self.mounted(place, root=mount.root) as guest:
                found = guest.ask(
                    "read",
                    path=_to_agent(quick.absolute(entry.path)),
                    place=_agent_mount(mount),
                    link=entry.target is not None,
                    limit=CONTENT_MAX,
                    limit_s=_time_limit_s(place),
                )["data"]
        except (FilesystemError, GuestError):
            return None
        return None if found is None else base64.b64decode(found)

    @contextmanager
    def browse(self, device: ReadableDevice, *, mount: Mount) -> Iterator[GuestBrowser]:
        """Open a mount, to walk through its directories."""
        place = self.place(device, mount.partition)
        try:
            with self.mounted(place, root=mount.root) as guest:
                yield GuestBrowser(guest, place, _agent_mount(mount))
        except GuestError as error:
            raise FilesystemError(str(error)) from None

    def examine(
        self, device: ReadableDevice, *, partition: PartitionName, fsck: bool = True
    ) -> Examination:
        """Tell whether it mounts, what the replay of its log changes, and what fsck says then.

        What changed includes what the kernel writes about the replay itself: blocks of the log, a
        superblock. Where it replays only when it mounts for writing, it is all that such a mount
        writes.
        """
        try:
            place = self.place(device, partition)
            with self.mounted(place) as guest:
                pass
            changed = guest.changed()
            said = self._fsck(guest, place) if fsck else "it was not asked for"
            if not replays_for_writing_only(place.device):
                with self.mounted(place, replay_only=True) as guest:
                    pass
                changed = guest.changed()
        except RefusedByKernelError as error:
            return Examination(False, str(error), (), "it does not mount")
        except (FilesystemError, GuestError) as error:
            return Examination(None, str(error), (), "it was not mounted")
        moved = [part for e in changed for part in place.on_disk(e.offset, e.length)]
        return Examination(True, None, tuple(moved), said)

    def close(self) -> None:
        """End the guest; it is booted anew if there is more to do."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        self._known = {}

    def place(self, device: ReadableDevice, partition: PartitionName) -> Slice:
        """Return the part of a disk that is to be mounted; FilesystemError if there is none."""
        place = quick.only(quick.candidates(device, partition))
        kind = kind_of(place.device)
        if kind is None:
            raise FilesystemError("no filesystem found: it begins with none that is known")
        if (part := elsewhere(place.device, kind)) is not None:
            raise FilesystemError(f"{part} on another device, which is not part of the recording")
        return place

    @contextmanager
    def mounted(
        self, place: Slice, *, root: str = "", replay_only: bool = False
    ) -> Iterator[CheckerGuest]:
        """Mount for the block; raises RefusedByKernelError, or GuestError with the guest gone.

        What shows is the top level of a filesystem if a `root` is to be looked for there, and else
        what a mount without options shows: of Btrfs the default subvolume. With `replay_only`
        nothing is written but what the log's replay writes.
        """
        driver = driver_of(place.device)
        options = [driver.options, driver.top_level] if root else [driver.options]
        is_ro = replay_only or is_seed(place.device)
        guest = self._booted()
        for program in (driver.program, *driver.probe[:1]):
            if program is not None:
                self._require(program)
        if place.length > DISK_SIZE:
            raise FilesystemError(f"it is longer than the checker guest's disk, {DISK_SIZE} bytes")
        try:
            guest.show(place.device)
            done = guest.ask(
                "mount",
                fs=driver.name,
                flags=NO_TIMES | (READ_ONLY if is_ro else 0),
                options=",".join(filter(None, options)),
                length=place.length,
                load=driver.name in FILESYSTEM_MODULES,
                program=driver.program,
                probe=driver.probe,
                limit_s=_time_limit_s(place),
            )
            if done["code"]:
                raise refusal(driver, done["code"], done["said"].splitlines() or guest.said)
        except FilesystemError:
            raise
        except BaseException:
            self.close()
            raise
        try:
            yield guest
            if code := guest.ask("umount", limit_s=_time_limit_s(place))["code"]:
                raise GuestError(f"the checker guest cannot unmount the state: {os.strerror(code)}")
        except BaseException:  # something may still be mounted
            self.close()
            raise

    def number_of(self, manifest: Manifest, guest: CheckerGuest) -> int:
        """Return the number under which the guest knows a manifest, after it was sent once."""
        for number, known in self._known.items():
            if known is manifest:
                return number
        number = len(self._known)
        entries = [_request(entry) for entry in manifest.entries]
        guest.ask("manifest", manifest=number, entries=entries)
        self._known[number] = manifest
        return number

    def _booted(self) -> CheckerGuest:
        if self._guest is None:
            self._lab = self._lab or build_lab(progress=self._progress)
            self._progress("checker: booting a guest")
            try:
                self._guest = CheckerGuest(self._lab)
            except GuestError:  # a boot says nothing of the state, so it is tried once more
                self._progress("checker: booting a guest once more")
                self._guest = CheckerGuest(self._lab)
        return self._guest

    def _subvolumes(self, place: Slice) -> tuple[list[str], list[str]]:
        """Return the subvolumes of a Btrfs that may be a root, and those that are left out."""
        self._booted()
        self._require("btrfs")
        with self.mounted(place, root="/") as guest:
            said = guest.ask("subvolumes", limit_s=_time_limit_s(place))
        for done in said.values():
            if done["code"]:
                raise FilesystemError(f"btrfs cannot list the subvolumes: {done['said'].strip()}")
        return chosen({which: done["said"] for which, done in said.items()})

    def _walk(
        self,
        place: Slice,
        mount: Mount,
        under: str,
        *,
        digests: bool,
        without: Matcher = no_file,
    ) -> list[Entry]:
        with self.mounted(place, root=mount.root) as guest:
            found = guest.ask(
                "walk",
                under=_to_agent(quick.absolute(under)).rstrip("/") or "/",
                place=_agent_mount(mount),
                digests=digests,
                limit=place.length,
                holes=HOLES_MAX,
                limit_s=_time_limit_s(place),
            )
        entries = [entry for entry in map(_entry, found["files"]) if not without(entry.path)]
        entries.sort(key=lambda entry: entry.path.split("/"))
        if errors := [one for one in found["errors"] if not without(_from_agent(one[0]))]:
            path, code = min(errors)
            what = _from_agent(path) or "/"
            if digests:
                raise FilesystemError(f"{what} cannot be read ({code})")
            raise quick.PartlyListedError(what, [entry.path for entry in entries])
        if digests and (endless := [entry for entry in entries if not entry.digest]):
            raise FilesystemError(
                f"{endless[0].path} is sparse and larger than its disk, or has too many zeroes; "
                "leave it out with --exclude"
            )
        return entries

    def _fsck(self, guest: CheckerGuest, place: Slice) -> Fsck | str:
        program = driver_of(place.device).fsck
        if not program:
            return "the lab has no checker for it"
        try:
            self._require(program[0])
            argv = [f"/tools/bin/{program[0]}", *program[1:]]
            done = guest.ask("fsck", argv=argv, limit_s=_time_limit_s(place))
        except FilesystemError as error:
            return Fsck(None, str(error))
        except GuestError as error:
            self.close()
            return Fsck(None, str(error))
        return concluded(program[0], done["code"], done["said"])

    def _require(self, program: str) -> None:
        """Raise FilesystemError if the guest does not have a program."""
        assert self._lab is not None
        if program not in self._lab.programs:
            raise FilesystemError(
                f"{program} is not installed here; run: sudo apt-get install {PACKAGE_OF[program]}"
            )


class KernelCheck:
    """A `ManifestCheck` by the kernel."""

    def __init__(
        self, oracle: KernelOracle, manifest: Manifest, earlier: EarlierDigests, mount: Mount
    ) -> None:
        self._oracle = oracle
        self._manifest = manifest
        self._earlier = earlier
        self._mount = mount
        self._last: Findings | None = None
        self.reads: RangeSet | None = None

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        """Tell the condition of every file on `device`.

        A state that is the same in all that the guest read of the one before is not mounted again.
        """
        if self._last and self.reads and changed is not None and not self.reads.touches(changed):
            return self._last
        watched = WatchedDevice(device)
        try:
            self._last = self._look(watched)
            self.reads = RangeSet(watched.take())
        except GuestError as error:
            self._last = self.reads = None
            return Findings(Verdict.UNKNOWN, reason=str(error))
        return self._last

    def _look(self, device: ReadableDevice) -> Findings:
        try:
            place = self._oracle.place(device, self._mount.partition)
            with self._oracle.mounted(place, root=self._mount.root) as guest:
                number = self._oracle.number_of(self._manifest, guest)
                found = guest.ask(
                    "judge",
                    manifest=number,
                    place=_agent_mount(self._mount),
                    limit=place.length,
                    holes=HOLES_MAX,
                    limit_s=_time_limit_s(place),
                )["files"]
        except RefusedByKernelError as error:
            lost = {entry.path: Condition.UNREADABLE for entry in self._manifest.entries}
            return Findings(Verdict.FAIL, lost, str(error))
        except FilesystemError as error:
            return Findings(Verdict.UNKNOWN, reason=str(error))
        return self._findings(found, place)

    def _findings(self, found: Sequence[Any], place: Slice) -> Findings:
        keeps_modes = driver_of(place.device).keeps_modes
        hides = has_ciphers(place.device)
        outcomes: dict[str, FileCheck] = {}
        for entry, one in zip(self._manifest.entries, found, strict=True):
            doubt = _doubt(entry, one, hides=hides)
            if doubt is not None:
                outcomes[entry.path] = FileCheck(Condition.CANNOT_BE_TOLD, f"{entry.path}: {doubt}")
                continue
            earlier = self._earlier.get(entry.path, ())
            condition = _condition(entry, one, earlier, keeps_modes=keeps_modes)
            outcomes[entry.path] = FileCheck(condition)
        verdict = quick.merge({outcome.verdict for outcome in outcomes.values()})
        reason = next((one.doubt for one in outcomes.values() if one.doubt), None)
        return Findings(verdict, {path: one.condition for path, one in outcomes.items()}, reason)


def chosen(said: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return which subvolumes may be a root, and which are left out, as btrfs-progs list them.

    The default one comes first, then the top level, and of the snapshots those with the shortest
    paths last: a snapshot that a system was restored from may be the root, and of those that are
    kept there may be thousands. See btrfs-subvolume(8).
    """
    [first] = _listed(said["first"]) or ["/"]  # "ID 5 (FS_TREE)" has no path
    kept = set(_listed(said["snapshots"])) - {first}
    others = [path for path in sorted(_listed(said["all"])) if path not in kept]
    snapshots = sorted(kept, key=lambda path: (path.count("/"), path))
    every = list(dict.fromkeys([first, "/", *others]))
    roots = [*every[:ROOTS_MAX], *snapshots[:SNAPSHOTS_MAX]]
    return roots, [*every[ROOTS_MAX:], *snapshots[SNAPSHOTS_MAX:]]


def _listed(said: str) -> list[str]:
    """Return the paths of a list of subvolumes; a name may have line breaks."""
    found = _SUBVOLUME.split(said)[1:]
    return [_from_agent("/" + path.removesuffix("\n")) for path in found]


def _time_limit_s(place: Slice) -> float:
    """Return how many seconds the guest may read: all of a disk, in software emulation."""
    return ANSWER_LIMIT_S + place.length / READ_RATE


def _doubt(entry: Entry, found: Any, *, hides: bool) -> str | None:
    """Say why an agent's answer decides nothing; `hides` if directories may be encrypted."""
    if found == 1:
        return None
    if found["kind"] == "error" and found["code"] == _ELSEWHERE:
        return "a link leads to another filesystem"
    if found["kind"] == "error" and found["code"] not in BROKEN:
        return f"the kernel cannot read it ({found['code']})"
    is_unread = found["kind"] == "file" and "digests" not in found
    if is_unread and entry.target is None and entry.size in {None, found["size"]}:
        return "sparse and larger than its disk, or with too many zeroes"
    if found["kind"] == "none" and hides:
        return "perhaps in an encrypted folder, for which the guest has no key"
    return None


def _condition(entry: Entry, found: Any, earlier: Iterable[str], *, keeps_modes: bool) -> Condition:
    """Return the condition by an agent's answer on a file."""
    if found == 1:
        return Condition.WHOLE
    kind = found["kind"]
    if kind == "none":
        return Condition.MISSING
    if kind == "error":
        return Condition.UNREADABLE
    if kind != ("file" if entry.target is None else "link"):
        return Condition.DAMAGED
    if kind == "link":
        target = found["target"].encode("latin-1")
        return classify(entry, len(target), [target], set(earlier))
    result = (
        conclude(
            entry,
            found["size"],
            found["digests"],
            set(earlier),
            all_zero=found["allZero"],
            zero_block=found["zeroBlock"],
        )
        if "digests" in found
        else classify(entry, found["size"], ())  # it is of another size
    )
    is_other = keeps_modes and entry.mode not in {None, found["mode"]}
    return Condition.DAMAGED if result is Condition.WHOLE and is_other else result


def _entry(found: Any) -> Entry:
    """Return the entry of a file or link in an agent's answer."""
    path = _from_agent(found["path"])
    if "target" in found:
        return link_entry(path, _from_agent(found["target"]))
    return Entry(path, found.get("digests", {}).get(SHA256, ""), found["size"], found["mode"])


def _request(entry: Entry) -> dict[str, object]:
    path, is_link = _to_agent(quick.absolute(entry.path)), entry.target is not None
    request = {"path": path, "link": is_link, "mode": entry.mode}
    return {**request, "algorithms": entry.algorithms, "digest": entry.digest}


def _agent_mount(mount: Mount) -> dict[str, object]:
    """Return a mount in the agent's form: paths without a slash at the end."""

    def sent(path: str) -> str:
        return _to_agent(quick.absolute(path)).rstrip("/")

    covered = [sent(point) for point in mount.covered]
    return {"point": sent(mount.point), "root": sent(mount.root), "covered": covered}


def _to_agent(path: bytes) -> str:
    """Encode bytes for the agent: as one character each."""
    return path.decode("latin-1")


def _from_agent(text: str) -> str:
    return quick.shown(text.encode("latin-1"))
