"""The lab: throw-away QEMU guests that run a workload on a disk."""
