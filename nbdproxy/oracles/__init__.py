"""Which files are on a block device, and whether they are whole.

Everything here reads a `ReadableDevice` and nothing else: no root, no kernel, no mount. Where the
answer is not certain the verdict is *unknown*; nothing is guessed.
"""
