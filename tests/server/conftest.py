"""What the tests of TLS share: the certificates, made once, and a server that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Certificates, make_certificates
from tests.support.proxies import Proxy


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Folders of certificates, right ones and wrong ones. Nobody may change them."""
    return make_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def serve(
    image: Path, tmp_path: Path, certificates: Certificates
) -> Iterator[Callable[..., Proxy]]:
    """Serve the image in a mode of TLS; `folder` is where the certificates are."""
    running: list[Proxy] = []

    def start(
        mode: str, *more: str | Path, folder: Path | None = None, listen: str | None = None
    ) -> Proxy:
        where = ("--tls-certificates", folder or certificates.good) if mode != "off" else ()
        home = tmp_path / f"proxy{len(running)}"
        proxy = Proxy(home, image, "--tls", mode, *where, *more, listen=listen)
        running.append(proxy)
        return proxy

    yield start
    for proxy in running:
        proxy.close()
        assert "Traceback" not in proxy.stderr, proxy.stderr
