"""Cuts of a recording, and the disk that a crash at a cut leaves: a crash state."""
