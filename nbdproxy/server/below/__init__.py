"""What lies below an export: another NBD server, QEMU and its qcow2 driver."""
