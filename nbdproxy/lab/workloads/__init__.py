"""What runs in a lab guest: npm, databases, renames, stress."""
