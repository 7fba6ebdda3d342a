"""Where the files of a manifest are on a disk: the guest's tree, found on a good state."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles import check
from nbdproxy.oracles import manifest as manifests
from nbdproxy.oracles.filesystems import KernelOnlyError
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.oracle import Oracle


@dataclass(frozen=True, slots=True)
class Where:
    """What is known of where files are.

    root       the directory that a manifest's paths begin at
    partition  the partition that all of them are on; 0 is the whole disk
    """

    root: str | None = None
    partition: int | None = None


ANYWHERE = Where()


def locate(
    oracle: Oracle, device: ReadableDevice, manifest: Manifest, where: Where = ANYWHERE
) -> tuple[Tree, Manifest]:
    """Find the filesystem that a manifest describes and resolve the manifest against it.

    Meant for a good state: what is found there then serves to check all others. Raises
    FilesystemError if nothing can be read, ManifestError if the manifest matches nowhere.
    """
    if where.root is not None:
        return Tree((Mount(partition=where.partition),)), below(where.root, manifest)
    found: list[tuple[int, int, Manifest]] = []
    failure: ManifestError | KernelOnlyError | None = None
    for part in check.candidates(device, where.partition):
        try:
            known = set(oracle.paths(device, mount=Mount(partition=part.number)))
            resolved = manifests.resolve(manifest, known)
        except (ManifestError, KernelOnlyError) as error:
            failure = error if failure is None or isinstance(error, KernelOnlyError) else failure
            continue
        count = sum(entry.path in known for entry in resolved.entries)
        found.append((count, part.number, resolved))
    if not found:
        assert failure is not None
        raise failure
    most = max(count for count, _, _ in found)
    best = [(number, resolved) for count, number, resolved in found if count == most]
    if len(best) > 1:
        numbers = ", ".join(str(number) for number, _ in best)
        raise FilesystemError(
            f"the manifest matches the partitions {numbers} equally well; name one of them "
            f"with --partition"
        )
    number, resolved = best[0]
    return Tree((Mount(partition=number),)), resolved


def below(root: str, manifest: Manifest) -> Manifest:
    """Put every path of a manifest below a directory of the guest."""
    return Manifest(
        tuple(
            replace(entry, path=posixpath.join("/", root, entry.path.lstrip("/")))
            for entry in manifest.entries
        )
    )
