"""nbdproxy: records what a virtual machine writes, and tells who lost the files."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nbdproxy")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
