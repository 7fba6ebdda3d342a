"""`nbdproxy audit`: does the store have what it acknowledged?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.cli.choices import Covers, Fsyncgate
from nbdproxy.cli.console import out, print_json
from nbdproxy.cli.recorded import recorded, telling
from nbdproxy.disks.formats import ImageFormat
from nbdproxy.persistence.model import Coverage, Options
from nbdproxy.report import audited


def audit(
    run: Annotated[Path, typer.Argument(help="A recording that has ended.")],
    image: Annotated[str, typer.Argument(help="The store as it is now: a file or an NBD URI.")],
    image_format: Annotated[
        ImageFormat | None,
        typer.Option("--format", help="What a file is.", show_default="as it was recorded"),
    ] = None,
    covers: Covers = Coverage.RECEIVED,
    fsyncgate: Fsyncgate = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the store with what was acknowledged: has it everything that a flush made durable?

    Each sector that was sent holds what was sent last; or something older that no flush had
    replaced, which is allowed; or it is a broken promise of what stands below nbdproxy. Look before
    anybody else writes to the store, and, if a host lost power, on a host that has forgotten its
    page cache. Exit code 1 if a promise was broken, or a place holds what it never may have; 2 if
    that cannot be told, because the recording was cut off or has no write.

    Examples:

      nbdproxy audit run1 disk.img

      nbdproxy audit run1 /mnt/gluster/disk.qcow2

      nbdproxy audit run1 nbd://storage.example/disk --json
    """
    with recorded(run, note=False) as source:
        model = Options(coverage=covers, fsyncgate=fsyncgate)
        with Case([source], model=model) as case, telling(case, "comparing"):
            try:
                report = case.audit(image, image_format)
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
        if json:
            print_json(audited.to_json(report))
        else:
            for line in audited.lines(report):
                out.print(line, markup=False)
    raise typer.Exit(report.code)
