"""Both ends of the driver, polled by one thread: the guest's, and those of the files below."""

from __future__ import annotations

import select
from collections.abc import Sequence

from nbdproxy.errors import ImageError, ProtocolError
from nbdproxy.reenactment.driver import FormatDriver
from nbdproxy.reenactment.file_server import FileServer
from nbdproxy.reenactment.guest import Guest, RequestRefusedError
from nbdproxy.requests import Request

_PATIENCE_S = 600
"""Seconds without anything from the driver; it has only our own answers to wait for."""


class Wires:
    """The guest and the files of a driver that runs.

    Raises ImageError where the driver ends, hangs, or does not do what it is asked.
    """

    def __init__(self, driver: FormatDriver, files: Sequence[FileServer]) -> None:
        self._driver = driver
        self._guest = Guest(driver.above)
        self._files = {one.sock.fileno(): one for one in files}
        self._poll = select.poll()
        self._above = driver.above.fileno()
        for fd in (self._above, *self._files):
            self._poll.register(fd, select.POLLIN)

    @property
    def positions(self) -> list[int]:
        """For each file the position in its recording that the next event will have."""
        return [one.position for one in self._files.values()]

    def request(self, request: Request) -> None:
        """Have a request sent with the next wait; its cookie is no other's that is in flight."""
        self._guest.request(request)

    def wait_ready(self) -> int:
        """Return the size of the guest's disk in bytes, once requests may be sent."""
        while self._guest.size is None:
            self._turn()
        return self._guest.size

    def wait(self, cookie: int) -> bool:
        """Return when a request is answered; tell whether it was not yet."""
        if cookie not in self._guest.unanswered:
            return False
        while cookie in self._guest.unanswered:
            self._turn()
        return True

    def finish(self) -> None:
        """Have all answered and the driver end in order, with what it still writes."""
        while self._guest.unanswered:
            self._turn()
        self._poll.unregister(self._above)
        self._driver.end()
        while any(one.is_open for one in self._files.values()):
            self._turn()
        if code := self._driver.wait():
            raise self._lost(f"it ended with {code}")

    def _turn(self) -> None:
        """Send what can be sent, wait until something has arrived, and take that in."""
        try:
            self._exchange()
        except RequestRefusedError as error:
            raise ImageError(
                f"QEMU answered with {error} what it had done when it was recorded; see whether "
                "the image is as it was then"
            ) from None
        except (ProtocolError, ConnectionError) as error:
            raise self._lost(str(error)) from None
        except OSError as error:
            raise ImageError(
                f"a file that QEMU reads and writes failed: {error.strerror}; make room in the "
                "folder for temporary files (TMPDIR), or see to the disk that the image is on"
            ) from None

    def _exchange(self) -> None:
        """What has arrived above is taken in first, and alone.

        What is below may be for requests that nobody waits for yet.
        """
        if self._guest.has_unsent:
            self._guest.send()
            wanted = select.POLLIN | (select.POLLOUT if self._guest.has_unsent else 0)
            self._poll.modify(self._above, wanted)
        ready = self._poll.poll(_PATIENCE_S * 1000)
        if not ready:
            raise ProtocolError(f"nothing came of it for {_PATIENCE_S} s")
        if any(fd == self._above and event & ~select.POLLOUT for fd, event in ready):
            self._guest.receive()
            return
        for fd, _ in ready:
            if fd != self._above:
                self._serve(fd)

    def _serve(self, fd: int) -> None:
        one = self._files[fd]
        one.serve()
        if not one.is_open:
            self._poll.unregister(fd)

    def _lost(self, reason: str) -> ImageError:
        what = "cannot open the image" if self._guest.size is None else "is lost"
        return ImageError(f"qemu-storage-daemon {what}: {self._driver.last_words or reason}")
