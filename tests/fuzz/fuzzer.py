"""One target under atheris: `python -m tests.fuzz.fuzzer TARGET [libFuzzer's arguments]`.

Only the product's code is instrumented, so that edges count what is tested, not what tests it.
`campaign` starts this with the arguments that a run needs.
"""

from __future__ import annotations

import importlib
import sys

import atheris


def main() -> None:
    """Hand the process over to the fuzzer; it does not return."""
    name, arguments = sys.argv[1], sys.argv[2:]
    with atheris.instrument_imports(include=["nbdproxy"]):
        targets = importlib.import_module("tests.fuzz.targets")
    target = {**targets.TARGETS, **targets.FAULTY}[name]
    more = {}
    if (mutated := targets.MUTATORS.get(name)) is not None:
        more["custom_mutator"] = lambda data, longest, seed: mutated(
            bytes(data), longest, seed, atheris.Mutate
        )
    atheris.Setup([sys.argv[0], *arguments], target, **more)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
