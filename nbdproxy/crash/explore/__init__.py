"""Which crash states there are, which to visit, what each holds, and the smallest that fails."""
