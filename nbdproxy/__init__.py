"""nbdproxy: records what a virtual machine writes, and tells who lost the files."""

__version__: str


def __getattr__(name: str) -> str:
    """Return `__version__`, looked up when it is asked for: that takes longer than all the rest."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        return version("nbdproxy")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
