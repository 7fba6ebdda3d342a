"""How results are shown: each form its own module."""
