"""Folders that no other user can change, and files made in them: by descriptor, and durable.

`open_folder` goes along a path name by name and refuses what another user could exchange: a folder
or link on the way that belongs to neither root nor us, and a folder that others can write to. In a
sticky one, as /tmp, they can only add names: whatever is made there is made new. Whoever owns / can
change everything anyway (in a user namespace that is the number of all who are not in it). A
group that has only its own user in it is not others. `new_file` and `new_folder` make things for
their owner alone (0600, 0700), which have their names only when they are whole and on the disk.

Not covered: root, whoever else has our user number, and access control lists that let others write
where the permissions do not.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from nbdproxy.errors import UnsafeFolderError

NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags of open(2) for a file that must not be there yet, not even as a link."""
_WAY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ANEW = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LINKS_MAX = 40
"""Links that a path may lead through, as in path_resolution(7)."""
_ACL = "system.posix_acl_access"


def sync_folder(fd: int) -> None:
    """Make a folder's names durable, where its filesystem can be asked to; some cannot."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise


def open_plain(path: Path) -> int:
    """Return the descriptor of a file to be read that is no link, pipe or device.

    For what belongs to a folder that may come from elsewhere. Raises OSError as of open(2).
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return fd


def open_anew(path: Path) -> int:
    """Return the descriptor of an empty file of ours; what it held is lost, if it was there.

    Raises UnsafeFolderError if it or its folder is somebody else's, and OSError as of open(2), also
    for a link.
    """
    folder = open_folder(path.parent)
    try:
        fd = os.open(path.name, _ANEW, 0o600, dir_fd=folder)
        try:
            _check_owner(fd, os.fstat(fd), path)
            os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(folder)


def is_trusted(user: int) -> bool:
    """Tell whether a user could do everything here anyway: we, root, and whoever owns /."""
    return user in {os.geteuid(), 0, os.stat("/").st_uid}  # noqa: PTH116 - no Path needed


def check_folder(path: Path, *, sticky: bool = True) -> None:
    """Raise UnsafeFolderError if others could exchange `path`, or what is in it.

    Without `sticky` they must not be able to add something, either. OSError as of open(2).
    """
    os.close(open_folder(path, sticky=sticky))


def check_file(path: Path) -> None:
    """Raise UnsafeFolderError if others could change or exchange a file; links are followed.

    OSError as of open(2), also for what is no plain file.
    """
    real = _followed(path)
    fd = open_plain(real)
    try:
        found = os.fstat(fd)
        _check_owner(fd, found, path)
        if _is_open_to_others(fd, found):
            raise UnsafeFolderError(
                f"{path} is not safe: other users can write to it; take that from them with: "
                f"chmod go-w {real}"
            )
    finally:
        os.close(fd)


def _followed(path: Path) -> Path:
    """Return where links lead, each of ours or root's, and in a folder that is safe."""
    real = path
    for _ in range(_LINKS_MAX):
        check_folder(real.parent)
        way = os.open(real, _WAY)  # the link itself
        try:
            found = os.fstat(way)
            _check_owner(way, found, path)
        finally:
            os.close(way)
        if not stat.S_ISLNK(found.st_mode):
            return real
        real = real.parent / real.readlink()
    raise UnsafeFolderError(f"{path} leads through too many links")


def open_folder(path: Path, *, sticky: bool = True, make: bool = False) -> int:
    """Return the descriptor of a folder that passes `check_folder`; `make` makes what is missing.

    What is made is on the disk when this returns, and only its owner may enter it (0700).
    """
    todo = _names(os.path.join(os.getcwd(), path))  # noqa: PTH109, PTH118 - `..` has to stay
    way, links = os.open("/", _WAY), 0
    try:
        _check(way, path)
        while todo:
            name = todo.pop()
            below = _enter(way, name, make=make)
            try:
                found = os.fstat(below)
                if stat.S_ISLNK(found.st_mode):
                    links += 1
                    if links > _LINKS_MAX:
                        raise UnsafeFolderError(f"{path} leads through too many links")
                    _check_owner(below, found, path)
                    target = os.readlink("", dir_fd=below)
                    todo += _names(target)
                    if target.startswith("/"):
                        way = _exchange(way, os.open("/", _WAY))
                else:
                    _check(below, path, sticky=sticky or bool(todo))
                    way = _exchange(way, os.dup(below))
            finally:
                os.close(below)
        return os.open(".", _FOLDER, dir_fd=way)
    finally:
        os.close(way)


def _names(path: str) -> list[str]:
    """Return the names on a path, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in {"", "."}]


def _exchange(old: int, new: int) -> int:
    os.close(old)
    return new


def _enter(folder: int, name: str, *, make: bool) -> int:
    try:
        return os.open(name, _WAY, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=folder)
        above = os.open(".", _FOLDER, dir_fd=folder)
        try:
            sync_folder(above)
        finally:
            os.close(above)
    return os.open(name, _WAY, dir_fd=folder)


def _check(folder: int, path: Path, *, sticky: bool = True) -> None:
    """Raise UnsafeFolderError if others can change what is in a folder on the way to `path`."""
    found = os.fstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, f"{_path_of(folder)} is not a folder", str(path))
    _check_owner(folder, found, path)
    if sticky and found.st_mode & stat.S_ISVTX:
        return
    if _is_open_to_others(folder, found):
        here = _path_of(folder)
        todo = f"take that from them with: chmod go-w {here}, or name a folder of your own"
        if found.st_mode & stat.S_ISVTX:
            todo = "name a new folder in it"
        raise UnsafeFolderError(f"{path} is not safe: other users can write to {here}; {todo}")


def _check_owner(thing: int, found: os.stat_result, path: Path) -> None:
    if is_trusted(found.st_uid):
        return
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = f"user {found.st_uid}"
    raise UnsafeFolderError(
        f"{path} is not safe: {_path_of(thing)} belongs to {owner}, who can put something else in "
        "its place; name a folder of your own"
    )


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - a name, not a place


def _is_open_to_others(thing: int, found: os.stat_result) -> bool:
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_private_group(thing, found)


def _is_private_group(thing: int, found: os.stat_result) -> bool:
    """Tell whether the group that may write is its owner's own: of his name, with nobody else."""
    try:
        user, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
        # With an access control list, the group's permission is that of all who are in the list.
        listed = _ACL in os.listxattr(f"/proc/self/fd/{thing}")
    except (KeyError, OSError):
        return False
    return (
        not listed
        and group.gr_name == user.pw_name
        and not {*group.gr_mem} - {user.pw_name}
        and all(one.pw_uid == user.pw_uid for one in pwd.getpwall() if one.pw_gid == group.gr_gid)
    )


class New:
    """A file or folder that is being made beside its place; `fd` is open on it.

    `path` is where it is now, for programs that want one; nobody else can exchange it.
    """

    def __init__(self, target: Path, folder: int, *, is_folder: bool) -> None:
        self._target = target
        self._folder = folder
        self._is_folder = is_folder
        self._name = f".nbdproxy-{secrets.token_hex(8)}.part"
        self.path = target.parent / self._name
        if is_folder:
            os.mkdir(self._name, 0o700, dir_fd=folder)
            self.fd = os.open(self._name, _FOLDER, dir_fd=folder)
        else:
            self.fd = os.open(self._name, os.O_RDWR | NEW, 0o600, dir_fd=folder)

    def finish(self) -> None:
        """Bring it to the disk, and give it its name; raises FileExistsError if that is taken.

        Files in a folder have to be on the disk before.
        """
        if self._is_folder:
            sync_folder(self.fd)
        else:
            os.fsync(self.fd)
        name = self._target.name
        if _is_there(name, self._folder):
            raise FileExistsError(errno.EEXIST, "it exists by now", str(self._target))
        os.rename(self._name, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        sync_folder(self._folder)

    def drop(self) -> None:
        """Close it, and remove it if it was not finished."""
        os.close(self.fd)
        if self._is_folder:
            shutil.rmtree(self._name, ignore_errors=True, dir_fd=self._folder)
        else:
            with suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._folder)


def _is_there(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def new_file(target: Path, *, is_folder: bool = False) -> Iterator[New]:
    """Have a file made that only its owner may read; without `finish` it is gone afterwards.

    Raises UnsafeFolderError, and OSError as of open(2).
    """
    folder = open_folder(target.parent)
    try:
        made = New(target, folder, is_folder=is_folder)
        try:
            yield made
        finally:
            made.drop()
    finally:
        os.close(folder)


def new_folder(target: Path) -> AbstractContextManager[New]:
    """Have a folder made that only its owner may enter, as `new_file` does."""
    return new_file(target, is_folder=True)
