"""Serves crash states over NBD, and runs commands on them."""
