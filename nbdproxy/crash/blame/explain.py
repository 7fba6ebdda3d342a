"""What became of single files: history, requests, what failures leave of them, and what is lacking.

Files of the same filesystem are followed together, one look at each state for all of them; what is
said of a file is what would be said if it were the only one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nbdproxy.crash.blame.block_owners import RecordingOwners
from nbdproxy.crash.blame.file_history import CarryingRequest, FileHistory, carrying_requests
from nbdproxy.crash.blame.ranges import Losses, LossFinder
from nbdproxy.crash.blame.replay import JudgedFiles, Replay, ReplayOptions, replay
from nbdproxy.oracles.composite import split
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Entries, Entry, Manifest


@dataclass(frozen=True, slots=True)
class FileExplanation:
    """One file's history, the requests that it is made of, and the table of the cut.

    The table is that of all files which were followed together. `losses` says what of the file the
    states lack in which it is not whole, by their ids.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     (told,) = case.explain(["/unflushed.bin"], [CacheMode.NONE]).files
    >>> [len(lost.ranges) > 0 for lost in told.losses.values()]
    [True]
    """

    history: FileHistory
    requests: tuple[CarryingRequest, ...]
    replay: Replay
    losses: Mapping[str, Losses]


def explain(
    files: JudgedFiles, histories: Sequence[FileHistory], options: ReplayOptions
) -> list[FileExplanation]:
    """Return what became of each file whose history is given, in that order.

    Raises what `replay` raises, and FilesystemError if a file's place on the disk is not clear.
    """
    tables = {
        path: table
        for share in _followed_together(files)
        for table in [replay(share, options)]
        for path in share.manifest.paths()
    }
    owners = RecordingOwners(files.timeline, files.tree, files.oracle)
    finder = LossFinder(owners, files.manifest)
    found = []
    for history in histories:
        table = tables[history.entry.path]
        requests = carrying_requests(owners, history.entry, options=options.model)
        lacking = _losses(finder, history.entry, table)
        found.append(FileExplanation(history, requests, table, lacking))
    return found


def _followed_together(files: JudgedFiles) -> Iterator[JudgedFiles]:
    """Yield the files of each mount, and those of which it is not known where they are."""
    parts, unknown = split(files.manifest, files.tree)
    lost = Manifest(Entries(entry for entry in files.manifest.entries if entry.path in unknown))
    for part in [*parts.values(), *([lost] if unknown else [])]:
        yield JudgedFiles(
            files.timeline, part, files.tree, files.oracle, files.progress, apart=True
        )


def _losses(finder: LossFinder, entry: Entry, table: Replay) -> dict[str, Losses]:
    """Return what the worst states of the cells lack of a file, each state once."""
    found: dict[str, Losses] = {}
    for cell in table.cells:
        outcome = cell.worst.files.get(entry.path)
        state = cell.worst.state
        if outcome is None or outcome.condition is Condition.WHOLE or str(state) in found:
            continue
        lost = finder.losses(entry, state)
        if lost is not None:
            found[str(state)] = lost
    return found
