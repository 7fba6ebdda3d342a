"""One tree of errors; each message is a sentence that says what the user can do about it.

Everything below `NbdproxyError` reaches the user as that one sentence and exit code 2. Anything
else that escapes is a bug of ours and keeps its traceback.
"""


class NbdproxyError(Exception):
    """The root: unusable input, or an environment that does not allow what was asked."""


class _OneLineError(NbdproxyError):
    """What quotes a user's own words, which may hold line breaks."""

    def __str__(self) -> str:
        return super().__str__().replace("\r", "\\r").replace("\n", "\\n")


class UsageError(_OneLineError, ValueError):
    """The command line asks for something contradictory or unknown."""


class OutputError(NbdproxyError, OSError):
    """What was asked for cannot be written to where it was to go: a disk is full, most likely."""


class ImageError(NbdproxyError, OSError):
    """The disk image is missing, unreadable, or not of a form that can be served."""


class TemporaryFolderError(NbdproxyError, OSError):
    """The folder for temporary files cannot be used."""


class UnsafeFolderError(NbdproxyError):
    """Another user could put something else in the place of what would be made there."""


class RecordingError(NbdproxyError):
    """A recording cannot be written, or what is there cannot be read as one."""


class RecordingFullError(RecordingError):
    """The recording cannot grow; nothing may pass unrecorded, so the export has to stop."""


class ProjectionError(NbdproxyError, ValueError):
    """A recording does not hold what a projection onto this cache mode would need."""


class PolicyError(_OneLineError, ValueError):
    """A policy file is unknown, unreadable or wrong; the message names file and key path."""


class ManifestError(NbdproxyError, ValueError):
    """A manifest is unreadable, or names nothing that the filesystem has."""


class FilesystemError(NbdproxyError):
    """No filesystem that can be read was found, or it is not in a state that can be judged."""


class ProtocolError(NbdproxyError):
    """The NBD peer broke the protocol in a way that cannot be answered; the connection ends."""


class LabError(NbdproxyError):
    """The lab's guest could not be built, did not boot, or did not do what it was told."""
