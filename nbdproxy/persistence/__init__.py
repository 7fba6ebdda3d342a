"""What a failure must and may leave: docs/persistence.md in code."""
