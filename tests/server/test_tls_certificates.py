"""Whose certificates are taken by whom, and what is said of those that cannot be used.

Not covered: certificates that have expired, and chains with an authority in between.
"""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.certificates import Certificates, client_context
from tests.support.proxies import MIB, Proxy
from tests.support.raw_client import TlsClient, assert_served, tls_uri
from tests.support.serving import nbdproxy, tool
from tests.support.strangers import lay_open

SIZE = MIB
Serve = Callable[..., Proxy]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


def test_a_clients_certificate_is_asked_for(serve: Serve, certificates: Certificates) -> None:
    proxy = serve("require", "--tls-verify-peer")
    assert_served(proxy.uri, client_context(certificates.good))
    assert "with TLS" in tool("nbdinfo", tls_uri(proxy.uri, certificates.good))
    tool("nbdinfo", tls_uri(proxy.uri, certificates.anonymous), code=1)
    assert_served(proxy.uri, client_context(certificates.good))


def test_without_verification_no_certificate_is_needed(
    serve: Serve, certificates: Certificates
) -> None:
    proxy = serve("require")
    with TlsClient(proxy.uri, client_context(certificates.anonymous)) as client:
        assert client.size == SIZE


@pytest.mark.parametrize("wrong", ["anonymous", "foreign", "revoked"])
def test_a_wrong_certificate_is_refused_and_the_server_goes_on(
    serve: Serve, certificates: Certificates, image: Path, wrong: str
) -> None:
    before = image.read_bytes()
    proxy = serve("require", "--tls-verify-peer", folder=certificates.revoking)
    folder = getattr(certificates, wrong)
    context = client_context(folder)
    context.load_verify_locations(certificates.good / "ca-cert.pem")
    with pytest.raises(OSError):
        TlsClient(proxy.uri, context).read(0, 512)
    assert "a client is turned away" in proxy.stderr
    assert image.read_bytes() == before
    assert_served(proxy.uri, client_context(certificates.good))


def test_a_revoked_certificate_is_good_enough_where_there_is_no_list(
    serve: Serve, certificates: Certificates
) -> None:
    proxy = serve("require", "--tls-verify-peer")
    with TlsClient(proxy.uri, client_context(certificates.revoked)) as client:
        assert client.size == SIZE


def test_a_client_refuses_a_server_of_another_authority(
    serve: Serve, certificates: Certificates
) -> None:
    """Over TCP: libnbd does not check who is at a Unix socket."""
    proxy = serve("require", listen="127.0.0.1:0")
    with pytest.raises(ssl.SSLCertVerificationError):
        TlsClient(proxy.uri, client_context(certificates.foreign))
    tool("nbdinfo", tls_uri(proxy.uri, certificates.foreign), code=1)
    assert "with TLS" in tool("nbdinfo", tls_uri(proxy.uri, certificates.good))
    assert_served(proxy.uri, client_context(certificates.good))


SENTENCES = {
    "no folder": (None, "--tls needs --tls-certificates DIR"),
    "an empty folder": ("empty", "server-cert.pem cannot be read"),
    "an unreadable key": ("unreadable", "server-key.pem cannot be read"),
    "another's key": ("mismatched", "belong to each other"),
    "a passphrase": ("locked", "have no passphrase"),
    "no PEM": ("nonsense", "must be PEM"),
}


@pytest.fixture
def wrong(tmp_path: Path, certificates: Certificates) -> Callable[[str], Path]:
    """Make a folder of certificates that cannot be used."""

    def make(kind: str) -> Path:
        folder = tmp_path / kind
        if kind in {"mismatched", "locked"}:
            return Path(getattr(certificates, kind))
        folder.mkdir()
        if kind == "unreadable":  # by root, too, which a mode alone would not be
            shutil.copy(certificates.good / "server-cert.pem", folder)
            (folder / "server-key.pem").mkdir()
        if kind == "nonsense":
            for name in ("server-cert.pem", "server-key.pem"):
                (folder / name).write_bytes(b"\xff\0nonsense\n" * 20)
        return folder

    return make


@pytest.mark.parametrize(("kind", "told"), SENTENCES.values(), ids=SENTENCES)
def test_unusable_certificates_are_told_in_a_sentence(
    image: Path, wrong: Callable[[str], Path], kind: str | None, told: str
) -> None:
    where = ("--tls-certificates", wrong(kind)) if kind is not None else ()
    said = nbdproxy("serve", image, "--tls", "require", *where, "--run", "true", code=2).stderr
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["ca-cert.pem", "ca-crl.pem"])
def test_an_unusable_authority_is_told_in_a_sentence(
    image: Path, tmp_path: Path, certificates: Certificates, name: str
) -> None:
    folder = tmp_path / "pki"
    shutil.copytree(certificates.good, folder)
    (folder / name).write_text("nonsense")
    words = ("--tls", "require", "--tls-certificates", folder, "--tls-verify-peer")
    said = nbdproxy("serve", image, *words, "--run", "true", code=2).stderr
    assert f"{name} is not a PEM file" in said
    assert said.count("\n") == 1


def _folder_laid_open(folder: Path) -> str:
    lay_open(folder)
    return f"{folder} is not safe: "


def _folder_open_to_all(folder: Path) -> str:
    folder.chmod(0o777)
    return f"other users can write to {folder}; take that from them with: chmod go-w {folder}"


def _key_laid_open(folder: Path) -> str:
    return f"{lay_open(folder / 'server-key.pem')} is not safe: "


def _authority_open_to_all(folder: Path) -> str:
    authority = folder / "ca-cert.pem"
    authority.chmod(0o666)
    return f"other users can write to it; take that from them with: chmod go-w {authority}"


def _authority_elsewhere(folder: Path) -> str:
    """A link of our own, to a place that is not."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / "ca-cert.pem").rename(elsewhere / "ca-cert.pem")
    (folder / "ca-cert.pem").symlink_to(elsewhere / "ca-cert.pem")
    elsewhere.chmod(0o777)
    return f"other users can write to {elsewhere}"


def _authority_by_way_of_elsewhere(folder: Path) -> str:
    """A link to a link of our own that others can exchange; the file that it leads to is safe."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / "ca-cert.pem").rename(folder / "real.pem")
    (elsewhere / "ca-cert.pem").symlink_to("../real.pem")
    (folder / "ca-cert.pem").symlink_to("elsewhere/ca-cert.pem")
    elsewhere.chmod(0o777)
    return f"other users can write to {elsewhere}"


def _nowhere(folder: Path) -> str:
    shutil.rmtree(folder)
    return f"{folder} is no folder of certificates (No such file or directory); name the one"


@pytest.mark.parametrize(
    "spoil",
    [
        _folder_laid_open,
        _folder_open_to_all,
        _key_laid_open,
        _authority_open_to_all,
        _authority_elsewhere,
        _authority_by_way_of_elsewhere,
        _nowhere,
    ],
)
def test_certificates_that_others_could_exchange_are_refused(
    image: Path, tmp_path: Path, certificates: Certificates, spoil: Callable[[Path], str]
) -> None:
    folder = tmp_path / "pki"
    shutil.copytree(certificates.good, folder)
    told = spoil(folder)
    words = ("--tls", "require", "--tls-certificates", folder, "--tls-verify-peer")
    said = nbdproxy("serve", image, *words, "--run", "true", code=2).stderr
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("spoil", [_folder_open_to_all, _authority_open_to_all, _nowhere])
def test_so_are_those_for_a_server_below(
    serve: Serve, tmp_path: Path, certificates: Certificates, spoil: Callable[[Path], str]
) -> None:
    below = serve("require")
    folder = tmp_path / "pki"
    shutil.copytree(certificates.good, folder)
    told = spoil(folder)
    said = nbdproxy("serve", tls_uri(below.uri, folder), "--run", "true", code=2).stderr
    assert told in said
    assert said.count("\n") == 1


def test_a_certificate_may_be_a_link_to_a_safe_place(
    serve: Serve, tmp_path: Path, certificates: Certificates
) -> None:
    """As certbot lays them out."""
    folder = tmp_path / "pki"
    folder.mkdir()
    for name in ("server-cert.pem", "server-key.pem"):
        (folder / name).symlink_to(certificates.good / name)
    proxy = serve("require", folder=folder)
    assert_served(proxy.uri, client_context(certificates.good))


def test_certificates_without_tls_are_refused(image: Path, certificates: Certificates) -> None:
    for words in (("--tls-certificates", certificates.good), ("--tls-verify-peer",)):
        said = nbdproxy("serve", image, *words, "--run", "true", code=2).stderr
        assert "only used with --tls allow or --tls require" in said
