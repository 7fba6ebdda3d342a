"""The errors of the ext4 reader.

They lead to different verdicts: `NoFilesystemError` and `RefusedError` leave the whole state
*unknown*, `CorruptError` is a certain loss of the one file, `UnsupportedError` leaves the one file
*unknown*.
"""

from nbdproxy.errors import FilesystemError


class NoFilesystemError(FilesystemError):
    """There is no ext2, ext3 or ext4 superblock where one would have to be."""


class RefusedError(FilesystemError):
    """The filesystem as a whole cannot be judged here; a real kernel has to be asked."""


class CorruptError(FilesystemError):
    """A structure is broken in a way that makes the kernel answer a read with an error."""


class UnsupportedError(FilesystemError):
    """The kernel could read this file; this reader cannot."""


def refusal(what: str) -> RefusedError:
    """Return the error for a filesystem that a kernel would most likely not mount, and why."""
    return RefusedError(
        f"the kernel would probably refuse to mount this filesystem ({what}); "
        f"ask with --oracle kernel"
    )
