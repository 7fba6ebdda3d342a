"""NBD URIs: the specification's examples, what is refused, and that reading undoes writing.

Not covered: whether a host or a socket exists.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.errors import UsageError
from nbdproxy.nbd.uri import NbdUri, is_uri, parse


@pytest.mark.parametrize(
    ("text", "export"),
    [
        ("nbd://example.com/disk", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/a/b", "a/b"),
        ("nbd://example.com/hello%20world", "hello world"),
        ("nbd://example.com/gr%C3%B6%C3%9Fe", "größe"),
        ("nbd://example.com/%ff", "\udcff"),
        ("nbd://example.com/a+b", "a+b"),
        ("nbd://example.com/a?tls", None),
    ],
)
def test_the_path_is_the_export(text: str, export: str | None) -> None:
    if export is None:
        with pytest.raises(UsageError):
            parse(text)
    else:
        assert parse(text) == NbdUri(export, host="example.com")


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://example.com:10810/x", NbdUri("x", host="example.com", port=10810)),
        ("nbd://example.com:/x", NbdUri("x", host="example.com")),
        ("NBDS://EXAMPLE.com/x", NbdUri("x", tls=True, host="EXAMPLE.com")),
        ("nbd://127.0.0.1", NbdUri(host="127.0.0.1")),
        ("nbd:///x", NbdUri("x")),
        ("nbd://:10810/x", NbdUri("x", port=10810)),
        ("nbd:///" + "x" * 4096, NbdUri("x" * 4096)),
        ("nbd://[::1]/x", NbdUri("x", host="::1")),
        ("nbds://[2001:db8::1]:1/", NbdUri(tls=True, host="2001:db8::1", port=1)),
        ("nbd://[fe80::1%25eth0]/", NbdUri(host="fe80::1%eth0")),
        ("nbd+unix:///disk?socket=sock", NbdUri("disk", socket="sock")),
        ("nbd+unix://?socket=sock", NbdUri(socket="sock")),
        ("nbd+unix:/disk?socket=sock", NbdUri("disk", socket="sock")),
        ("nbd+unix:///?socket=/tmp/a+b%26c", NbdUri(socket="/tmp/a+b&c")),
        ("nbd+unix:///?socket=%00/abstract", NbdUri(socket="\0/abstract")),
        ("nbds+unix:///?socket=s", NbdUri(tls=True, socket="s")),
        ("nbd+unix:///?socket=s&peer-user=a%26b", NbdUri(socket="s", peer_user="a&b")),
        (
            "nbds+unix:///?tls-hostname=h&socket=s&tls-verify-peer=0&tls-certificates=/c&tls-type=x509",
            NbdUri(tls=True, socket="s", certificates="/c", tls_hostname="h", verify_peer=False),
        ),
        ("nbds://h/?tls-verify-peer=1", NbdUri(tls=True, host="h")),
    ],
)
def test_where_the_server_is(text: str, uri: NbdUri) -> None:
    assert parse(text) == uri
    assert parse(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nbd+vsock://2/disk", "it has to begin with nbd:, nbds:, nbd+unix:, nbds+unix:"),
        ("nbd+ssh://host/", "it has to begin with"),
        ("http://host/", "it has to begin with"),
        ("disk.img", "it has to begin with"),
        ("", "it has to begin with"),
        ("nbd:localhost:10809:exportname=x", "the host is missing"),
        ("nbd:/disk", "the host is missing"),
        ("nbd:unix:/tmp/sock", "the host is missing"),
        ("nbd://user@host/", "a user name"),
        ("nbd://user:secret@host/", "a user name"),
        ("nbd+unix://user@/?socket=s", "a Unix socket has no host"),
        ("nbd://host/disk#1", "write # as %23"),
        ("nbd://host/my disk", "' ' cannot stand in a URI; write %20"),
        ("nbd://host/größe", "write %C3%B6"),
        ("nbd://host/a\nb", "write %0A"),
        ("nbd://host/%", "'%' cannot stand in a URI; write %25"),
        ("nbd://host/%2", "write %25"),
        ("nbd://host/%zz", "write %25"),
        ("nbd://host/a%00b", "NUL in its name"),
        ("nbd://host/" + "x" * 4097, "more than 4096 bytes"),
        ("nbd://::1/", "in brackets"),
        ("nbd://[::1/", "in brackets"),
        ("nbd://[]/", "'' is no IPv6 address"),
        ("nbd://[127.0.0.1]/", "'127.0.0.1' is no IPv6 address"),
        ("nbd://[fe80::1%25a%00]/", "is no IPv6 address"),
        ("nbd://ho%73t/", "is no host"),
        ("nbd://h:0/", "'0' is no port"),
        ("nbd://h:65536/", "'65536' is no port"),
        ("nbd://h:ten/", "'ten' is no port"),
        ("nbd://h:" + "9" * 5000, "is no port"),
        ("nbd://h/?socket=s", "socket= is for Unix sockets"),
        ("nbd://h/?peer-user=u", "peer-user= is for Unix sockets"),
        ("nbd+unix:///?socket=s&peer-user=", "peer-user needs a value"),
        ("nbd+unix:///", "add ?socket=PATH"),
        ("nbd+unix:///?socket=", "socket needs a value"),
        ("nbd+unix:///?socket", "socket needs a value"),
        ("nbd+unix:///?socket=a%00b", "socket needs a value without a NUL"),
        ("nbd+unix:///?socket=a&socket=b", "socket is there twice"),
        ("nbd+unix://host/?socket=a", "a Unix socket has no host"),
        ("nbd://h/?x-cache=1", "'x-cache' is not known"),
        ("nbd+unix:///?socket=a&", "'' is not known"),
        ("nbd+unix:///?SOCKET=a", "'SOCKET' is not known"),
        ("nbd://h/?tls-hostname=x", "tls-hostname is for TLS"),
        ("nbd+unix:///?socket=s&tls-certificates=x", "tls-certificates is for TLS"),
        ("nbds://h/?tls-type=psk", "only TLS with certificates"),
        ("nbds://h/?tls-type=anon", "only TLS with certificates"),
        ("nbds://h/?tls-username=me", "'tls-username' is not known"),
        ("nbds://h/?tls-verify-peer=no", "tls-verify-peer is 0 or 1"),
        ("nbds://h/?tls-hostname=", "tls-hostname needs a value"),
        ("nbds://h/?tls-certificates=%00", "tls-certificates needs a value without a NUL"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(text)
    assert words in str(refusal.value)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "text", ["nbd://host", "nbd:disk", "NBDS://h", "nbd+unix:///?socket=s", "nbd+vsock://2"]
)
def test_uris_are_told_from_paths(text: str) -> None:
    assert is_uri(text)


@pytest.mark.parametrize(
    "text", ["", "nbd", "./nbd:disk", "/nbd://x", "nbdx://h", "disk.img", "http://h", " nbd://h"]
)
def test_paths_are_told_from_uris(text: str) -> None:
    assert not is_uri(text)


def decoded(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


texts = st.binary(min_size=1, max_size=30).map(lambda raw: decoded(raw.replace(b"\0", b"n")))
hosts = st.sampled_from(["localhost", "a-b.example", "127.0.0.1", "::1", "fe80::2%eth0", "1::"])
tcp = st.builds(NbdUri, texts | st.just(""), host=hosts, port=st.integers(1, 65535))
unix = st.builds(
    NbdUri,
    texts | st.just(""),
    socket=texts | texts.map(lambda path: "\0" + path),
    peer_user=st.none() | texts,
)
plain = tcp | unix


@st.composite
def secure(draw: st.DrawFn) -> NbdUri:
    """A URI with TLS, with every parameter there is."""
    base = draw(plain)
    return NbdUri(
        *(base.export, True, base.host, base.port, base.socket),
        certificates=draw(st.none() | texts),
        tls_hostname=draw(st.none() | texts),
        verify_peer=draw(st.booleans()),
    )


@given(plain | secure())
def test_reading_undoes_writing(uri: NbdUri) -> None:
    text = str(uri)
    assert is_uri(text)
    assert text.isascii()
    assert parse(text) == uri


@given(st.text() | st.text("nbdsuix+:/?#[]@&=%0aF.socket-", max_size=40).map("nbd".__add__))
def test_any_text_is_a_uri_or_a_usage_error(text: str) -> None:
    try:
        uri = parse(text)
    except UsageError:
        return
    assert parse(str(uri)) == uri
