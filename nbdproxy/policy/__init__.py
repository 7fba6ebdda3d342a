"""Policies: what goes wrong with a disk, declared in a file."""
