"""`ExportProvider`: the exports clients can ask for: fixed ones, or made when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.server.export.export import Export


class ExportProvider(Protocol):
    """What a listener offers."""

    @property
    def infos(self) -> Mapping[str, ExportInfo]:
        """What each export is, by name; the first one listed is the default."""
        ...

    @property
    def noted(self) -> Iterable[Export]:
        """The exports whose recordings tell who was turned away."""
        ...

    def take(self, name: str) -> Export:
        """Return an export for one connection."""
        ...

    def put_back(self, export: Export) -> None:
        """Take it back when the connection has ended."""
        ...


class FixedExports:
    """Exports that are there as long as they are served, shared by all connections."""

    def __init__(self, exports: Iterable[Export]) -> None:
        self._exports = {export.info.name: export for export in exports}
        self.infos: Mapping[str, ExportInfo] = {
            name: export.info for name, export in self._exports.items()
        }

    @property
    def noted(self) -> Iterable[Export]:
        """All of them."""
        return self._exports.values()

    def take(self, name: str) -> Export:
        """Return an export for one connection."""
        return self._exports[name]

    def put_back(self, export: Export) -> None:
        """Do nothing: it stays open for the others."""
