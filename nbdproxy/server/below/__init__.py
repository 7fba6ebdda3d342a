"""What lies below an export: stores, another NBD server, QEMU's monitor and image formats."""
