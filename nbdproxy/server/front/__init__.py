"""What clients meet: listeners, sessions, endpoints, the control socket."""
