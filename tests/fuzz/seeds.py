"""What the fuzzer begins with: a legal session for each option, command and style of the tables.

`python -m tests.fuzz.seeds` stores them in tests/fuzz/corpus, beside the inputs that were findings
once; `dictionary` has the words that random bytes would not hit.

Not covered: the client's seeds, which `client_seeds` has.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nbdproxy.nbd.constants import Option, ReplyStyle, TlsMode
from nbdproxy.nbd.tables import COMMAND_RULES, FLAG_NEEDS, OPTION_RULES, Body, Needs
from nbdproxy.requests import Command, CommandFlag
from tests.fuzz.client_seeds import client_seeds
from tests.fuzz.replies_target import ACTIONS, ARENAS, ROW
from tests.fuzz.server_model import MAX_OPTIONS
from tests.fuzz.server_target import OWED, SERVERS, STEPS
from tests.nbd import spec
from tests.nbd.wire import FLAGS, contexts, go, info_body, opening, option, query_body, request

CORPUS = Path(__file__).parent / "corpus"
_BODIES = {
    Body.EMPTY: b"",
    Body.IGNORED: b"good-bye",
    Body.NAME: b"disk",
    Body.NAME_AND_INFOS: info_body(b"disk", [0, 1, 2, 3]),
    Body.NAME_AND_QUERIES: query_body(b"disk", b"base:", spec.CONTEXT, b"qemu:x"),
}
_BEFORE = {Needs.NOTHING: b"", Needs.CHUNKS: option(8), Needs.COMPACT: b"", Needs.PLAINTEXT: b""}


def chooser(stream: bytes, *, exports: int = 0, tls: TlsMode = TlsMode.OFF) -> bytes:
    """A stream for the target `server`, behind the bytes that choose its setting."""
    step, owed = len(stream) % len(STEPS), len(stream) // 7 % len(OWED)
    return bytes([exports * len(TlsMode) + tls, owed * len(STEPS) + step]) + stream


def _server_seeds() -> Iterator[tuple[str, bytes]]:
    assert len(SERVERS) % len(TlsMode) == 0
    for number, rule in OPTION_RULES.items():
        name = Option(number).name.lower()
        asked = option(number, _BODIES[rule.body])
        stream = FLAGS + _BEFORE[rule.needs] + asked
        if number not in {Option.STARTTLS, Option.GO, Option.EXPORT_NAME}:
            stream += go(b"disk")
        yield f"option-{name}", chooser(stream)
        for tls in (TlsMode.ALLOW, TlsMode.REQUIRE):
            behind = FLAGS + option(5) + _BEFORE[rule.needs] + asked + go()
            yield f"option-{name}-tls-{tls.name.lower()}", chooser(behind, tls=tls)
    for style in ReplyStyle:
        yield from _command_seeds(style)
        yield from _range_seeds(style)
    chosen = contexts(10, b"disk", spec.CONTEXT)
    for name, agreed in {"structured": option(8), "extended": option(11) + chosen}.items():
        behind = FLAGS + agreed + option(5) + go(b"disk") + request(Command.READ, 0, 512)
        yield f"forgotten-{name}", chooser(behind, tls=TlsMode.ALLOW)
        status = request(Command.BLOCK_STATUS, 0, 512, style=1 + (name == "extended"))
        for opened in (b"disk", b"other", b""):
            stream = FLAGS + agreed + chosen + go(opened, number=6) + go(opened) + status
            yield f"contexts-{name}-{opened.decode() or 'default'}", chooser(stream)
        failed = contexts(10, b"disk", b"no namespace")
        stream = FLAGS + agreed + chosen + failed + go() + status
        yield f"contexts-{name}-replaced", chooser(stream)
    for count in (MAX_OPTIONS - 1, MAX_OPTIONS):
        yield f"options-{count}", chooser(FLAGS + option(3) * count + go())
    yield "no-exports", chooser(FLAGS + option(3) + go() + option(1), exports=len(SERVERS) // 3 - 1)
    for flags in range(3):
        yield f"client-flags-{flags}", chooser(bytes([0, 0, 0, flags]) + option(1, b"disk"))


def _command_seeds(style: ReplyStyle) -> Iterator[tuple[str, bytes]]:
    hello = opening(style, with_contexts=style is not ReplyStyle.SIMPLE)
    word = style.name.lower()
    everything = b""
    for number, rule in COMMAND_RULES.items():
        length = 512 if rule.ranged else 0
        payload = b"w" * length if number == Command.WRITE else b""
        extended = spec.PAYLOAD_LEN if payload and style is ReplyStyle.EXTENDED else 0
        for flag in (0, *(flag for flag in FLAG_NEEDS if flag & (rule.flags | CommandFlag.FUA))):
            sent = request(
                *(number, 0, length), flags=int(flag) | extended, payload=payload, style=style
            )
            name = f"{word}-{Command(number).name.lower()}-{CommandFlag(flag).name or 'plain'}"
            everything += sent
            yield f"command-{name.lower()}", chooser(hello + sent)
    disc = request(Command.DISC, style=style)
    for exports, kind in enumerate(("writable", "read-only", "huge", "bare")):
        stream = hello + everything + disc
        yield f"all-{word}-{kind}", chooser(stream, exports=exports)
    if style is ReplyStyle.EXTENDED:
        asked = struct.pack(">QI", 2**40, spec.CONTEXT_ID)
        for number in COMMAND_RULES:
            sent = request(
                *(number, 0, 12), flags=spec.PAYLOAD_LEN, payload=asked, style=style
            ) + request(Command.READ, 0, 512, style=style)
            name = f"payload-{Command(number).name.lower()}"
            yield name, chooser(hello + sent, exports=2)


def _range_seeds(style: ReplyStyle) -> Iterator[tuple[str, bytes]]:
    """Ranges at the edge of the rules and over it, all commands in one session."""
    hello = opening(style, with_contexts=style is not ReplyStyle.SIMPLE)
    bound = 2**64 if style is ReplyStyle.EXTENDED else 2**32
    for name, offset, length in [
        ("last", 2**20 - 512, 512),
        ("empty", 512, 0),
        ("odd", 1, 512),
        ("beyond", 2**20, 512),
        ("wrapped", 2**64 - 512, 512),
        ("wrapped-around", 2**64 - 512, 1024),
        ("huge", 0, bound - 512),
    ]:
        stream = hello
        for number in COMMAND_RULES:
            if number != Command.WRITE:
                stream += request(number, offset, length, style=style)
            elif length <= 1024:
                payload = b"w" * length
                stream += request(number, offset, length, payload=payload, style=style)
        yield f"range-{style.name.lower()}-{name}", chooser(stream)


def _replies_seeds() -> Iterator[tuple[str, bytes]]:
    take = ROW.pack(ACTIONS.index("take"), 0, 0, 0, 0)
    for style in ReplyStyle:
        everything = b""
        for number, action in enumerate(ACTIONS):
            for flags, mask in ((0, 0), (4, 0xFFFF), (8, 0x0FF0), (0, 0x5A0F), (0, 0xF000)):
                everything += ROW.pack(number, flags, 7 * number, 60, mask)
            row = ROW.pack(number, 0, 8, 99, 0x3C00)
            name = f"{style.name.lower()}-{action.replace(' ', '-')}"
            yield name, bytes([style, len(ARENAS) - 1]) + row + take + row
        for arena in range(len(ARENAS)):
            yield f"{style.name.lower()}-all-{arena}", bytes([style, arena]) + everything + take


SEEDS: dict[str, Callable[[], Iterable[tuple[str, bytes]]]] = {
    "server": _server_seeds,
    "replies": _replies_seeds,
    "client": client_seeds,
}


def seeds(target: str) -> dict[str, bytes]:
    """The seeds of a target by the names of their files; a reader's are stored, and not made."""
    return dict(SEEDS[target]()) if target in SEEDS else {}


def dictionary() -> str:
    """Words of the protocol, in the form that libFuzzer reads."""
    words = [
        *(b"NBDMAGIC", b"IHAVEOPT", FLAGS, b"disk", b"other", b"base:", spec.CONTEXT),
        *(struct.pack(">I", magic) for magic in (0x25609513, 0x21E41C71, 0x67446698)),
        *(struct.pack(">I", magic) for magic in (0x668E33EF, 0x6E8A278C)),
        struct.pack(">Q", 0x3E889045565A9),
        *(struct.pack(">I", kind) for kind in (1, 2, 3, 4, *range(2**31 + 1, 2**31 + 11))),
        *(struct.pack(">H", kind) for kind in (0x8001, 0x8002, spec.PAYLOAD_LEN)),
        *(struct.pack(">I", number) for number in (512, 4096, 2**25, 2**25 + 1, 2**32 - 512)),
        *(struct.pack(">Q", number) for number in (512, 2**32, 2**63, 2**64 - 512)),
        *(option(number) for number in OPTION_RULES),
        *(contexts(10, b"disk", spec.CONTEXT), go(b"disk"), option(5)),
        *(request(number, 0, 512) for number in COMMAND_RULES),
        *(request(number, 0, 512, style=spec.EXTENDED) for number in COMMAND_RULES),
    ]
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in words)
    return "".join(f'"{word}"\n' for word in quoted)


def main() -> None:
    """Store the seeds of all targets."""
    for target in SEEDS:
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds(target).items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
