"""nbdproxy: records what a virtual machine writes, and tells who lost the files.

What this package gives is in `nbdproxy.library`, which is imported when something of it is used:

    >>> import nbdproxy
    >>> [mode.value for mode in nbdproxy.CacheMode]
    ['none', 'writeback', 'writethrough', 'directsync', 'unsafe']
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdproxy.library import (
        AuditReport,
        CacheMode,
        Case,
        Cause,
        Cell,
        Check,
        Checked,
        Condition,
        Entry,
        Every,
        Explained,
        ExplorationReport,
        ExploreRequest,
        Failure,
        FileExplanation,
        FileOutcome,
        ImageFormat,
        Level,
        Manifest,
        MinimumReport,
        NbdproxyError,
        OracleName,
        Policy,
        Recording,
        Replay,
        ServedInThread,
        StateChoice,
        StateId,
        StateOutcome,
        Together,
        Verdict,
        Where,
        load_manifest,
        load_policy,
        manifest_of,
        policy_names,
        serve,
    )

    __version__: str

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
    "__version__",
    "load_manifest",
    "load_policy",
    "manifest_of",
    "policy_names",
    "serve",
]


def __getattr__(name: str) -> Any:
    """Return what is public, imported when it is asked for: all of it takes most of a second.

    `__version__` is looked up, which takes longer than all else that is not imported.
    """
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nbdproxy import library  # noqa: PLC0415

    return getattr(library, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        return version("nbdproxy")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
