"""The shell: sockets, threads and signals. The only room that knows trio."""
