"""One check for all mounts of a guest's tree: each file is judged on the mount that has its path.

Guarantees: a file's condition is what the oracle says of it on its own filesystem. It is
*cannot-be-told*, with the reason, where that filesystem cannot be judged as a whole, or it is not
known which filesystem has the file. With one mount that has every file, the findings are the
oracle's own. Of a disk or partition that reads all zeroes, which no oracle can read, all files are
missing.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles.blank import missing_if_blank
from nbdproxy.oracles.check import Findings, Verdict, merge
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.globs import Matcher, no_file
from nbdproxy.oracles.manifest import Entries, Entry, Manifest
from nbdproxy.oracles.mounts import Mount, Tree, is_below
from nbdproxy.oracles.oracle import EarlierDigests, ManifestCheck, Oracle
from nbdproxy.oracles.watched import RangeSet, ReadRange
from nbdproxy.sizes import plural


class TreeCheck:
    """A `ManifestCheck` of files on any mounts of a tree."""

    def __init__(
        self, oracle: Oracle, manifest: Manifest, earlier: EarlierDigests, tree: Tree
    ) -> None:
        parts, self._unknown = split(manifest, tree)
        self._manifest = manifest
        self._parts: list[tuple[Mount, Manifest, ManifestCheck]] = [
            (mount, part, oracle.prepare_check(part, earlier=earlier, mount=mount))
            for mount, part in parts.items()
        ]
        self._last: list[Findings] = []
        self._findings: Findings | None = None

    @property
    def reads(self) -> RangeSet | None:
        """The bytes of the disk that the last findings depend on; None if that is not known."""
        found: list[ReadRange] = []
        for (_, _, follower), said in zip(self._parts, self._last, strict=True):
            # The oracle did not read all bytes of a disk that is blank.
            reads = follower.reads if said.conditions else None
            if reads is None:
                return None
            found += reads.ranges()
        return RangeSet(found)

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        """Tell the condition of every file; findings that did not change are the same object."""
        changed = None if changed is None else list(changed)
        said = [follower.check(device, changed) for _, _, follower in self._parts]
        is_same = len(said) == len(self._last) and all(
            now is before and now.conditions for now, before in zip(said, self._last, strict=True)
        )
        self._last = said
        if not is_same or self._findings is None:
            found = [
                missing_if_blank(one, device, part, mount)
                for one, (mount, part, _) in zip(said, self._parts, strict=True)
            ]
            self._findings = self._merged(found)
        return self._findings

    def _merged(self, found: list[Findings]) -> Findings:
        if len(found) == 1 and not self._unknown:
            return found[0]
        conditions = dict.fromkeys(self._unknown, Condition.CANNOT_BE_TOLD)
        reasons = []
        for one, (_, part, _) in zip(found, self._parts, strict=True):
            conditions |= one.conditions or dict.fromkeys(part.paths(), Condition.CANNOT_BE_TOLD)
            reasons += [one.reason] if one.reason is not None else []
        for reason, count in Counter(self._unknown.values()).items():
            reasons.append(f"{plural(count, 'file')} cannot be told: {reason}")
        verdicts = {one.verdict for one in found}
        verdicts |= {Verdict.UNKNOWN} if self._unknown else set()
        in_order = {path: conditions[path] for path in self._manifest.paths()}
        return Findings(merge(verdicts), in_order, "; ".join(dict.fromkeys(reasons)) or None)


def split(manifest: Manifest, tree: Tree) -> tuple[dict[Mount, Manifest], dict[str, str]]:
    """Return the files of each mount, and of the others why their mount is not known."""
    places: dict[Mount, array[int]] = {}
    unknown: dict[str, str] = {}
    for at, path in enumerate(manifest.paths()):
        found = tree.of(path)
        if isinstance(found, str):
            unknown[path] = found
        else:
            places.setdefault(found, array("Q")).append(at)
    if len(places) == 1 and not unknown:
        return dict.fromkeys(places, manifest), unknown
    parts = {mount: (manifest.entries[at] for at in some) for mount, some in places.items()}
    return {mount: Manifest(Entries(some)) for mount, some in parts.items()}, unknown


def scan(
    oracle: Oracle,
    device: ReadableDevice,
    under: str,
    tree: Tree,
    *,
    modes: bool = False,
    without: Matcher = no_file,
) -> Manifest:
    """Describe the files below a directory of a tree, on all its mounts that can be read.

    Files of the paths that `without` means are not read.
    Raises FilesystemError at the first file that cannot be read.
    """
    here = tree.of(under)
    below = [mount for mount in tree.mounts if mount != here and is_below(mount.point, under)]
    if isinstance(here, str) and not below:
        raise FilesystemError(f"{under}: {here}")
    asked = below if isinstance(here, str) else [here, *below]
    found: list[Entry] = []
    for mount in asked:
        found += oracle.scan(device, under, mount=mount, modes=modes, without=without).entries
    return Manifest(tuple(found))


def content(oracle: Oracle, device: ReadableDevice, entry: Entry, tree: Tree) -> bytes | None:
    """Return what a file of a tree holds, as `Oracle.content` does."""
    mount = tree.of(entry.path)
    return None if isinstance(mount, str) else oracle.content(device, entry, mount=mount)
