"""Cases: recordings, the files that should be on them, and all that can be asked about these."""
