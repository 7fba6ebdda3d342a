"""What the fuzzer begins with for the client: servers that say what they should, in each style."""

from __future__ import annotations

from collections.abc import Iterator

from nbdproxy.nbd.constants import ReplyStyle
from nbdproxy.nbd.tables import COMMAND_RULES
from nbdproxy.requests import Command
from tests.fuzz.client_target import CONTEXTS, DISCONNECTS, REQUEST, TLS
from tests.fuzz.server_target import STEPS
from tests.nbd import client_wire as wire
from tests.nbd import spec

_LENGTH = 1024
_COMMANDS = sorted(COMMAND_RULES)


def chooser(
    stream: bytes,
    *commands: int,
    wants: int = CONTEXTS,
    best: ReplyStyle = ReplyStyle.EXTENDED,
    flags: int = 0,
) -> bytes:
    """A stream for the target `client`, behind what it wants and asks for."""
    rows = b"".join(REQUEST.pack(_COMMANDS.index(command), flags, 8, 1) for command in commands)
    return bytes([wants | best << 3, len(stream) % len(STEPS), len(commands)]) + rows + stream


def client_seeds() -> Iterator[tuple[str, bytes]]:
    """Names and inputs."""
    for style in ReplyStyle:
        word, hello = style.name.lower(), wire.opening(style)
        everything = b""
        for cookie, number in enumerate(_COMMANDS, 1):
            name = Command(number).name.lower()
            if number == Command.BLOCK_STATUS and style is ReplyStyle.SIMPLE:
                continue
            for kind, answer in _answers(style, number, 1).items():
                yield f"{word}-{name}-{kind}", chooser(hello + answer, number)
            everything += next(iter(_answers(style, number, cookie).values()))
        wants = CONTEXTS | DISCONNECTS
        yield f"{word}-all", chooser(hello + everything, *_COMMANDS, wants=wants)
        behind = wire.greeting() + wire.reply(wire.STARTTLS) + hello[18:] + everything
        yield f"{word}-tls", chooser(behind, *_COMMANDS, wants=CONTEXTS | TLS)
        lacking = wire.opening(style, contexts=False)
        yield f"{word}-no-contexts", chooser(lacking, Command.FLUSH)
        if style is not ReplyStyle.SIMPLE:
            yield from _hostile(style)
    yield from _old_servers()


def _hostile(style: ReplyStyle) -> Iterator[tuple[str, bytes]]:
    """Answers that are nearly right: what breaks a rule of the whole is far from random bytes."""
    hello, word = wire.opening(style), style.name.lower()
    pieces = {
        "first": wire.data(4096, b"d" * 512),
        "second": wire.data(4608, b"d" * 512),
        "all": wire.data(4096, b"d" * _LENGTH),
        "before": wire.data(3584, b"d" * 512),
        "behind": wire.data(5120, b"d" * 512),
        "across": wire.data(4352, b"d" * 512),
    }

    def chunk(kind: int, body: bytes, flags: int) -> bytes:
        return wire.chunk(kind, body, style=style, flags=flags, offset=4096)

    for names in ("first second", "first first", "first across", "all all", "before", "behind"):
        chunks = [chunk(wire.DATA, pieces[name], 0) for name in names.split()]
        stream = hello + b"".join(chunks) + chunk(wire.NONE, b"", 1)
        for flags in (0, wire.DF):
            name = f"{word}-{'df' if flags else 'read'}-{names.replace(' ', '-')}"
            yield name, chooser(stream, Command.READ, flags=flags)
    bad = chunk(wire.ERROR_OFFSET, wire.error(spec.EIO, b"bad", (4096).to_bytes(8)), 0)
    behind_error = hello + bad + chunk(wire.DATA, pieces["first"], 1)
    yield f"{word}-read-behind-its-error", chooser(behind_error, Command.READ)
    kind = wire.STATUS_EXT if style is ReplyStyle.EXTENDED else wire.STATUS
    one, two = [(1024, 3)], [(512, 3), (512, 0)]
    for extents in (one, two, [(2**20 - 4096, 0)], [(2**20, 0)], [(0, 0)], [*two, *one]):
        status = chunk(kind, wire.status(extents, style=style), 1)
        name = f"{len(extents)}-of-{extents[0][0]}"
        for flags in (0, wire.REQ_ONE):
            one_only = "one" if flags else "status"
            stream = hello + status
            yield f"{word}-{one_only}-{name}", chooser(stream, wire.BLOCK_STATUS, flags=flags)


def _answers(style: ReplyStyle, number: int, cookie: int) -> dict[str, bytes]:
    """Right answers to a request of 1024 bytes at 4096."""
    offset = 4096 if number != Command.FLUSH else 0
    if style is ReplyStyle.SIMPLE:
        data = b"d" * _LENGTH if number == Command.READ else b""
        return {"ok": wire.simple(cookie, data=data), "error": wire.simple(cookie, spec.EIO)}

    def chunk(kind: int, body: bytes = b"", flags: int = 1) -> bytes:
        return wire.chunk(kind, body, style=style, flags=flags, cookie=cookie, offset=offset)

    found = {"ok": chunk(wire.NONE)}
    if number == Command.READ:
        first, second = wire.data(offset, b"d" * 512), wire.hole(offset + 512, 512)
        found = {
            "ok": chunk(wire.DATA, wire.data(offset, b"d" * _LENGTH)),
            "pieces": chunk(wire.HOLE, second, 0) + chunk(wire.DATA, first, 0) + chunk(wire.NONE),
            "hole": chunk(wire.HOLE, wire.hole(offset, _LENGTH)),
            "offset": chunk(wire.DATA, first, 0)
            + chunk(wire.ERROR_OFFSET, wire.error(spec.EIO, b"bad", offset.to_bytes(8))),
        }
    elif number == Command.BLOCK_STATUS:
        kind = wire.STATUS_EXT if style is ReplyStyle.EXTENDED else wire.STATUS
        extents = wire.status([(512, 3), (65_536, 0)], style=style)
        found = {
            "ok": chunk(kind, extents),
            "then-none": chunk(kind, extents, 0) + chunk(wire.NONE),
        }
    return found | {"error": chunk(wire.ERROR, wire.error(spec.EIO, b"broken"))}


def _old_servers() -> Iterator[tuple[str, bytes]]:
    """Servers that know less, or that say no."""
    unsup = wire.reply(wire.GO, wire.UNSUP)
    by_name = b"\x00\x00\x00\x00\x00\x10\x00\x00\x00\x6d"
    start = wire.greeting()
    yield (
        "export-name",
        chooser(start + unsup + by_name, Command.FLUSH, wants=0, best=ReplyStyle.SIMPLE),
    )
    zeroes = wire.greeting(1) + unsup + by_name + bytes(124) + wire.simple()
    yield "export-name-zeroes", chooser(zeroes, Command.FLUSH, wants=0, best=ReplyStyle.SIMPLE)
    for kind in (wire.POLICY, wire.TLS_REQD, wire.UNKNOWN, wire.SHUTDOWN):
        refusal = wire.reply(wire.GO, kind, b"not for you")
        yield f"refused-{kind - 2**31}", chooser(start + refusal, wants=0, best=ReplyStyle.SIMPLE)
        refusal = wire.reply(wire.STARTTLS, kind)
        yield f"refused-tls-{kind - 2**31}", chooser(start + refusal, wants=TLS)
    told = wire.info_text(1, b"disk") + wire.info_text(2, b"a description")
    told += wire.info_blocks(512, 4096, 2**25) + wire.info_export()
    yield (
        "infos",
        chooser(start + told + wire.reply(wire.GO), Command.FLUSH, wants=0, best=ReplyStyle.SIMPLE),
    )
