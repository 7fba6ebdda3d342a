# Makes /dev/vdb1 the first LENGTH bytes of /dev/vdb, and mounts it if a kind is given.
#
# perl attach.pl LENGTH [KIND FLAGS OPTIONS]: prints the errno of mount(2), 0 if it is mounted.
# Fails, by its status, if the partition cannot be made: then nothing was mounted.
#
# Perl, for it makes system calls by their number (of amd64) and is part of every Debian. A mount
# program says what went wrong in words only, and tries again read-only where it was not told to.
# A partition that is made anew has nothing of the one before in the kernel's cache.

my ($length, $kind, $flags, $options) = @ARGV;
my ($BLKPG, $ADD, $DELETE, $MOUNT) = (0x1269, 1, 2, 165);    # <linux/blkpg.h>, mount(2)
my $sectors = int(($length + 511) / 512);

sub blkpg {    # struct blkpg_ioctl_arg, and in it struct blkpg_partition
    my ($operation) = @_;
    my $partition = pack('qqi x64 x64 x4', 0, $sectors * 512, 1);
    return ioctl($disk, $BLKPG, pack('iii x4 P', $operation, 0, length $partition, $partition));
}

open($disk, '<', '/dev/vdb') or die "/dev/vdb: $!\n";
blkpg($DELETE) or $! == 6 or die "the partition before: $!\n";
blkpg($ADD) or die "the partition: $!\n";
close($disk);
if (defined $kind) {
    my ($part, $root) = ('/dev/vdb1', '/mnt');    # syscall takes no literals
    my $ok = syscall($MOUNT, $part, $root, $kind, $flags + 0, $options);
    print $ok == 0 ? 0 : $! + 0, "\n";
}
