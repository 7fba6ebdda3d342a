"""A load in the manner of fsstress, and a check of what it left: a workload's script.

Several processes at once, each on its own tree and now and then on one they share, create,
overwrite, append, truncate, rename, link and remove files, make, rename and remove directories,
and call fsync and sync. Then the disk's files are read again with all caches dropped. They have to
be what they were before, and each process's own tree what the same steps leave in memory.
`/stress.sha256` on the disk keeps their digests, for whoever reads it elsewhere.

Guarantees: a seed repeats what each process asks for, in its order; how the processes interleave
is the guest's scheduler's choice, and with it what is in the shared tree. Only errors that two
processes in one tree can give each other are passed over.

Does not cover symbolic links, extended attributes, mmap and direct I/O.
"""

from __future__ import annotations

DIGESTS = "stress.sha256"
"""The file on the target disk that lists the others, with their paths from its top."""

_SCRIPT = r"""
pick() {  # sets $picked to a number below $1
  state=$(((state * 1103515245 + 12345) & 0x7fffffff)); picked=$(((state >> 16) % $1))
}
pick_file() {  # sets $picked to a path, in a directory that may not be there
  pick 4; in=d$picked/; [ $picked = 3 ] && in=; pick 12; picked=${in}f$picked
}
copy() {  # copies up to 64 KiB from somewhere to the file $1, with dd's options behind it
  to=$1; shift; pick 64; count=$((picked + 1)); pick 1024
  dd if=/bin/busybox of=$to bs=1k count=$count skip=$picked status=none "$@"
}
step() {
  pick_file; file=$picked; pick_file; other=$picked; pick 3; folder=d$picked; pick 20
  case $picked in
    0 | 1 | 2 | 3) copy $file ;;
    4) copy $file conv=fsync ;;
    5 | 6) pick 256; copy $file seek=$picked conv=notrunc ;;
    7 | 8) copy $file oflag=append conv=notrunc ;;
    9) pick 20000; truncate -c -s $((picked * 10)) $file ;;
    10 | 11) mv $file $other ;;
    12) ln $file $other ;;
    13) rm $file ;;
    14 | 15) mkdir $folder ;;
    16) pick 4; if [ $picked = 3 ]; then rm -r $folder; else mv -T $folder d$picked; fi ;;
    17 | 18) pick 4; if [ $picked = 3 ]; then sync; else sync -d $file; fi ;;
    19) echo 3 > /proc/sys/vm/drop_caches ;;
  esac
}
process() {  # takes the steps of process $1 below $2
  mkdir -p $2/own$1 $2/shared; state=$((seed * 1000 + $1)); n=0
  while [ $n -lt $steps ]; do
    n=$((n + 1)); pick 4
    if [ $picked = 3 ]; then cd $2/shared; else cd $2/own$1; fi
    step
  done
}
digests() { (cd $1 && find . -type f ! -name $listed | sort | xargs sha256sum); }
all() { for i in $(seq $processes); do process $i $1 & done 2>> /tmp/said; wait; }
all $PWD
digests . > $listed; cp $listed /tmp/found; sync; echo 3 > /proc/sys/vm/drop_caches
digests . | diff /tmp/found - || exit 1
all /tmp/twin
digests /tmp/twin | grep ./own > /tmp/expected
grep ./own /tmp/found | diff /tmp/expected - || exit 1
! grep -v -e 'No such file' -e 'File exists' -e 'not empty' /tmp/said
"""


def script(*, seed: int = 1, processes: int = 4, steps: int = 150) -> str:
    """Return the shell script; its status is 0 if everything is as it has to be."""
    return f"seed={seed} processes={processes} steps={steps} listed={DIGESTS}\n{_SCRIPT}"
