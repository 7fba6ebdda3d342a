/* ptrace(2) for a User Mode Linux that has no room for all registers of a process.
 *
 * Linux 6.1 keeps 2,696 bytes of them, which has all but those of AMX, and the host's kernel takes
 * no fewer than it has: PTRACE_SETREGSET fails with EFAULT, and init dies ("ptrace set fp regs
 * failed"). So what is not given is set to what it is. Loaded by LD_PRELOAD; needs no libc headers:
 *
 *     cc -shared -fPIC -O1 -nostdlib -fno-stack-protector -o uml_registers.so uml_registers.c
 */

enum { PEEKUSER = 3, GETREGSET = 0x4204, SETREGSET = 0x4205, NT_X86_XSTATE = 0x202, SYS_ptrace = 101 };

struct iovec {
    char *base;
    unsigned long length;
};

extern int *__errno_location(void);

static char whole[65536] __attribute__((aligned(64)));

static long call(long request, long pid, unsigned long address, void *data)
{
    register void *fourth __asm__("r10") = data;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(SYS_ptrace), "D"(request), "S"(pid), "d"(address), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
}

long ptrace(long request, long pid, unsigned long address, void *data)
{
    struct iovec all = {whole, sizeof whole};
    int peeks = request >= 1 && request <= PEEKUSER;
    long result = 0, peeked = 0;

    request &= 0xffffffff;
    pid = (int)pid;
    if (request == SETREGSET && address == NT_X86_XSTATE) {
        struct iovec *given = data;

        result = call(GETREGSET, pid, address, &all);
        for (unsigned long at = 0; at < given->length && at < all.length; at++)
            ((volatile char *)whole)[at] = given->base[at];
        data = &all;
    }
    if (result >= 0)
        result = call(request, pid, address, peeks ? &peeked : data);
    if (result < 0) {
        *__errno_location() = (int)-result;
        return -1;
    }
    return peeks ? peeked : result;
}
