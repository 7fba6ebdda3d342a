"""Recordings: everything that passed, on disk, in a form that survives the recorder."""
