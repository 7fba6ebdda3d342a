"""The throw-away guest: its kernel, initramfs, tools, accelerator, and disk."""
