/*
 * Preloaded into kexec (ld.so.preload in dom0), this lets the libxenctrl of one Xen find out how many CPUs another has.
 *
 * All that kexec asks by a versioned hypercall is that: xc_get_max_cpus() makes a sysctl, which a Xen of another
 * interface version refuses with EACCES (xen/common/sysctl.c). What it reads of the answer lies at the same place in
 * all of them, and the kexec hypercall has not changed since Xen 4.4.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>

enum { HYPERVISOR_SYSCTL = 35, OLDEST = 0x08, NEWEST = 0x40 };

struct sysctl { /* how each begins: xen/include/public/sysctl.h */
    uint32_t cmd;
    uint32_t interface_version;
};

int xencall1(void *handle, unsigned int number, uint64_t argument)
{
    int (*real)(void *, unsigned int, uint64_t) = (int (*)(void *, unsigned int, uint64_t))dlsym(RTLD_NEXT, "xencall1");
    int result = real(handle, number, argument);
    struct sysctl *sysctl = (struct sysctl *)(uintptr_t)argument;

    if (number != HYPERVISOR_SYSCTL)
        return result;
    for (uint32_t version = OLDEST; result == -1 && errno == EACCES && version <= NEWEST; version++) {
        sysctl->interface_version = version;
        result = real(handle, number, argument);
    }
    return result;
}
