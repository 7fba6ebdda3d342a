"""A filesystem that shows in the middle of a guest's tree, and what its paths lead to there.

The content of each file is its own path in the filesystem.
"""

from __future__ import annotations

from pathlib import Path

from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Entry, Manifest, digest, link_entry
from nbdproxy.oracles.mounts import Mount

FILES = ("here/a", "here/sub/b", "here/over/c", "here/over2/d", "a", "etc/e")
LINKS = {
    "here/absolute": "/srv/data/sub/b",
    "here/relative": "sub/../sub/b",
    "here/out": "../a",
    "here/away": "/etc/e",
    "here/onto": "/srv/data/over/c",
    "here/into": "over/c",
    "here/near": "/srv/data2/a",
    "here/longer": "over2/d",
    "here/up": "/srv/data/sub/../../data/a",
}
MOUNT = Mount("/srv/data", None, "/here", ("/srv/data/over",))
EXPECTED = {
    "/srv/data/a": ("here/a", Condition.WHOLE),
    "/srv/data/./sub//b": ("here/sub/b", Condition.WHOLE),
    "/srv/data/gone": ("here/gone", Condition.MISSING),
    "/srv/data/absolute": ("here/sub/b", Condition.WHOLE),
    "/srv/data/relative": ("here/sub/b", Condition.WHOLE),
    "/srv/data/longer": ("here/over2/d", Condition.WHOLE),
    "/srv/data/out": ("a", Condition.CANNOT_BE_TOLD),
    "/srv/data/away": ("etc/e", Condition.CANNOT_BE_TOLD),
    "/srv/data/onto": ("here/over/c", Condition.CANNOT_BE_TOLD),
    "/srv/data/into": ("here/over/c", Condition.CANNOT_BE_TOLD),
    "/srv/data/near": ("here/a", Condition.CANNOT_BE_TOLD),
    "/srv/data/up": ("here/a", Condition.CANNOT_BE_TOLD),
}
"""Of each path of the guest what the manifest says it holds, and what comes of it."""


def fill(folder: Path) -> None:
    """Make the files and links below a folder."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)


def manifest() -> Manifest:
    """What should be there: each file, and one of the links themselves."""
    entries = [
        Entry(path, digest([name.encode()]), len(name)) for path, (name, _) in EXPECTED.items()
    ]
    return Manifest((*entries, link_entry("/srv/data/sub/../out", "../a")))


def expected() -> dict[str, Condition]:
    """The condition of each."""
    conditions = {path: condition for path, (_, condition) in EXPECTED.items()}
    return {**conditions, "/srv/data/sub/../out": Condition.WHOLE}


LISTED = {f"/srv/data/{n.removeprefix('here/')}" for n in (*FILES, *LINKS) if n.startswith("here/")}
SEEN = {path for path in LISTED if not path.startswith("/srv/data/over/")}
"""All that the guest sees of the filesystem."""
