"""The command line: one module for each command; the only room that wires the others together."""
