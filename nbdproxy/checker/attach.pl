# Mounts, for agent.js: takes a command a line, its words between tabs, and answers each with a line.
#
# attach LENGTH: makes /dev/vdb1 the first LENGTH bytes of /dev/vdb. One that is made anew has
#                nothing of the one before in the kernel's cache.
# mount KIND FLAGS OPTIONS, umount: mount(2) of it at /mnt, and umount2(2)
#
# The answer is the errno, 0 if all went well. Mount programs tell it in words only, and try again
# read-only where nobody asked them to. Perl can make system calls by their number (here of amd64),
# and is part of every Debian.

my ($part, $root) = ('/dev/vdb1', '/mnt');    # syscall takes no literals
my ($MOUNT, $UMOUNT, $ENXIO) = (165, 166, 6);
my ($BLKPG, $ADD, $DELETE) = (0x1269, 1, 2);    # <linux/blkpg.h>

sub blkpg {    # struct blkpg_ioctl_arg, and in it struct blkpg_partition
    my ($disk, $operation, $bytes) = @_;
    my $partition = pack('qqi x132', 0, $bytes, 1);
    return ioctl($disk, $BLKPG, pack('iii x4 P', $operation, 0, length $partition, $partition));
}

sub attach {
    my ($length) = @_;
    open(my $disk, '<', '/dev/vdb') or return;
    blkpg($disk, $DELETE, 0) or $! == $ENXIO or return;    # the first time there is none
    return blkpg($disk, $ADD, int(($length + 511) / 512) * 512);
}

$| = 1;
while (my $line = <STDIN>) {
    chomp $line;
    my ($command, @words) = split /\t/, $line, -1;
    my $ok;
    if ($command eq 'attach') { $ok = attach(@words); }
    if ($command eq 'mount') {
        my ($kind, $flags, $options) = @words;
        $ok = syscall($MOUNT, $part, $root, $kind, $flags + 0, $options) == 0;
    }
    if ($command eq 'umount') { $ok = syscall($UMOUNT, $root, 0) == 0; }
    print $ok ? 0 : $! + 0, "\n";
}
