"""ext2, ext3 and ext4 as the kernel would see them right after a mount: read-only, no kernel.

`filesystem.open_filesystem` replays the journal in memory and gives names, inodes and content.
Written from the kernel's "ext4 Disk Layout" documentation. Where the filesystem carries
checksums they are verified as the kernel does, so a block that the kernel would refuse is refused
here too. Not covered: encryption, verity, external journals, fast commits that are not empty.
"""
