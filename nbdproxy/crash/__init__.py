"""Cuts, crash states, and what each cache mode x failure makes of a recording."""
