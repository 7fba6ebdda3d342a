"""Under which cache mode a recording was taken, from its requests and from what the disk is."""

from __future__ import annotations

from dataclasses import replace

from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import NbdproxyError
from nbdproxy.oracles.qcow2 import is_qcow2
from nbdproxy.persistence.modes import CacheMode, Taken, recorded_under

_ABOVE_QCOW2 = (
    "recorded above qcow2: a QEMU that is killed and has the qcow2 file open itself also loses "
    "what was written into new clusters since the last flush, which is not in this table"
)


def taken_under(timeline: Timeline, stated: CacheMode | None = None) -> Taken:
    """Tell what `recorded_under` does, of a recording that is opened.

    Where the disk cannot be read, as without its image, it may be a qcow2 file.
    """
    source = timeline.source
    try:
        below_qcow2 = is_qcow2(timeline.at(source.events))
    except NbdproxyError:
        below_qcow2 = None
    taken = recorded_under(
        source.table, stated, offers_fua=source.offers_fua, below_qcow2=below_qcow2
    )
    if source.above_qcow2:
        remarks = (taken.remark, _ABOVE_QCOW2)
        taken = replace(taken, remark="; ".join(filter(None, remarks)))
    return taken
