"""What `import nbdproxy` gives: serve and record disks, and ask what a crash would have cost.

A first round, with a program of one's own in the place of a virtual machine:

    >>> import nbdproxy
    >>> with nbdproxy.serve("disk.img", record="first") as served:
    ...     write_files(served.uri)
    >>> with nbdproxy.Case.open("first", files="files.sha256") as case:
    ...     table = case.replay([nbdproxy.CacheMode.NONE]).table
    >>> worst = {cell.failure.value: cell.worst.verdict.value for cell in table.cells}
    >>> worst["guest-reset"], worst["host-power-loss"]
    ('pass', 'fail')

Errors that a user can do something about are `NbdproxyError`; each says what to do. Whatever a case
returns that reads a disk can be used as long as the case is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nbdproxy.case.case import Case, Explained
from nbdproxy.case.exploring import Check, ExploreRequest
from nbdproxy.case.oracles import OracleName
from nbdproxy.case.states import StateChoice
from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.blame.explain import FileExplanation
from nbdproxy.crash.blame.replay import Cell, FileOutcome, Replay, StateOutcome
from nbdproxy.crash.blame.together import Together
from nbdproxy.crash.explore.planning import Every
from nbdproxy.crash.states.naming import StateId
from nbdproxy.crash.states.recorded import RecordedSource as Recording
from nbdproxy.disks.formats import ImageFormat
from nbdproxy.errors import NbdproxyError, UsageError
from nbdproxy.oracles import manifest as manifests
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.policy import loader
from nbdproxy.policy.compose import load_all
from nbdproxy.policy.model import Policy
from nbdproxy.report.audited import AuditReport
from nbdproxy.report.checked import Checked
from nbdproxy.report.explored import ExplorationReport
from nbdproxy.report.minimized import MinimumReport
from nbdproxy.server.assemble import ExportPlan, opened
from nbdproxy.server.threaded import ServedInThread

__all__ = [
    "AuditReport",
    "CacheMode",
    "Case",
    "Cause",
    "Cell",
    "Check",
    "Checked",
    "Condition",
    "Entry",
    "Every",
    "Explained",
    "ExplorationReport",
    "ExploreRequest",
    "Failure",
    "FileExplanation",
    "FileOutcome",
    "ImageFormat",
    "Level",
    "Manifest",
    "MinimumReport",
    "NbdproxyError",
    "OracleName",
    "Policy",
    "Recording",
    "Replay",
    "ServedInThread",
    "StateChoice",
    "StateId",
    "StateOutcome",
    "Together",
    "Verdict",
    "Where",
    "load_manifest",
    "load_policy",
    "manifest_of",
    "policy_names",
    "serve",
]


@contextmanager
def serve(
    image: Path | str,
    *,
    policy: Policy | str = "passthrough",
    record: Path | str | None = None,
    socket: Path | str | None = None,
    image_format: ImageFormat | None = None,
    read_only: bool = False,
    overlay: bool = False,
    seed: int = 0,
) -> Iterator[ServedInThread]:
    """Serve a disk over NBD while a `with` block runs, in a thread of its own.

    image         a raw file, a block device, or the NBD URI of another server
    policy        what goes wrong, and when; or its name, or the path of its file
    record        record all that passes to this new folder
    socket        listen on this Unix socket; by default on one in a folder of its own
    image_format  what a file is, if it is not raw: the disk in it is served
    read_only     refuse every write
    overlay       never write the image
    seed          what the policy draws lots with

    What a `with` block is given has the `uri` and the `socket`, and can `cut` the power. A
    recording can be asked about when the block has ended. Raises ImageError, RecordingError or
    PolicyError, and on leaving what failed meanwhile.

    >>> with serve("disk.img", policy="drop-unflushed", overlay=True) as served:
    ...     write_files(served.uri)
    ...     served.is_off
    False
    """
    if read_only and overlay:
        raise UsageError("read_only and overlay exclude each other; choose one")
    plan = ExportPlan(
        str(image),
        load_policy(policy) if isinstance(policy, str) else policy,
        image_format=image_format,
        read_only=read_only,
        overlay=overlay,
        record=None if record is None else Path(record),
        seed=seed,
    )
    with ServedInThread(
        [partial(opened, plan)], None if socket is None else Path(socket)
    ) as served:
        yield served


def policy_names() -> list[str]:
    """Return the names of the policies that nbdproxy brings.

    >>> "drop-unflushed" in policy_names()
    True
    """
    return loader.names()


def load_policy(*names: str, settings: Sequence[str] = ()) -> Policy:
    """Return the policies of these names, or paths of files, as one.

    `settings` are KEY=VALUE, or POLICY.KEY=VALUE, for the parameters that they have. Raises
    PolicyError for one that is not there or cannot be read, UsageError for a setting.

    >>> load_policy("slow-disk", settings=["delay_s=0.5"]).name
    'slow-disk'
    """
    return load_all(names, settings)


def load_manifest(path: Path | str) -> Manifest:
    """Return the files that a manifest lists, in the format of `sha256sum`.

    Raises ManifestError if it cannot be read as one.

    >>> sorted(entry.path for entry in load_manifest("files.sha256").entries)
    ['/flushed.bin', '/unflushed.bin']
    """
    return manifests.load(Path(path))


def manifest_of(folder: Path | str, under: str | None = None) -> Manifest:
    """Return the files and links in a folder, with their digests; `under` is its place in a guest.

    Raises ManifestError if something in it cannot be read.

    >>> [entry.path for entry in manifest_of("tree", "/app").entries]
    ['/app/a.txt', '/app/b.txt']
    """
    return manifests.from_directory(Path(folder), under)
