"""One guest for all tests that ask the kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdproxy.checker.oracle import KernelOracle


@pytest.fixture(scope="session")
def kernel() -> Iterator[KernelOracle]:
    oracle = KernelOracle()
    yield oracle
    oracle.close()
