"""What all rooms of the server use: sockets, TLS, the power supply, budgets, warnings."""
