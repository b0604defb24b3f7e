/*
 * The lab's toolstack in dom0, on the libxenctrl of the Xen that runs:
 *
 *   domu create VCPUS      a PVH domain (HVM with hardware-assisted paging, no device model) of 4 MiB, each vCPU pinned to
 *                          the CPU of its number and spinning in domu_kernel; prints its domain ID
 *   domu rounds DOMID VCPUS   how often each vCPU has counted in domu_kernel
 *   domu dump DOMID FILE   its core, as `xl dump-core` writes it
 */
#define XC_WANT_COMPAT_MAP_FOREIGN_API

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xenctrl.h>
#include <xen/hvm/save.h>
#include <xenguest.h>

#define PAGES 1024
#define KERNEL_FRAME 0x100
#define DIRECTORY_FRAME 0x101
#define COUNTS_FRAME 0x102

extern const char domu_kernel[], domu_kernel_end[];

static void need(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static uint32_t created(xc_interface *xch, unsigned int vcpus)
{
    uint32_t domid = 0;
    struct xen_domctl_createdomain config = {
        .flags = XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap,
        .max_vcpus = vcpus,
        .max_evtchn_port = 127,
        .max_grant_frames = 4,
        .max_maptrack_frames = 4,
#ifdef XEN_DOMCTL_GRANT_version
        .grant_opts = XEN_DOMCTL_GRANT_version(1),
#endif
        .arch.emulation_flags = XEN_X86_EMU_LAPIC,
    };

    need(!xc_domain_create(xch, &domid, &config), "xc_domain_create");
    return domid;
}

static void populate(xc_interface *xch, uint32_t domid)
{
    xen_pfn_t frames[PAGES];
    void *kernel;

    for (unsigned int i = 0; i < PAGES; i++)
        frames[i] = i;
    need(!xc_domain_setmaxmem(xch, domid, (PAGES + 16) * 4), "xc_domain_setmaxmem");
    need(!xc_domain_populate_physmap_exact(xch, domid, PAGES, 0, 0, frames), "xc_domain_populate_physmap_exact");
    kernel = xc_map_foreign_range(xch, domid, XC_PAGE_SIZE, PROT_READ | PROT_WRITE, KERNEL_FRAME);
    need(kernel != NULL, "xc_map_foreign_range");
    memcpy(kernel, domu_kernel, domu_kernel_end - domu_kernel);
    munmap(kernel, XC_PAGE_SIZE);
}

/* The registers of every vCPU, as records of an HVM domain's saved state (public/hvm/save.h). */
static void set_registers(xc_interface *xch, uint32_t domid, unsigned int vcpus)
{
    struct {
        struct hvm_save_descriptor header_is;
        HVM_SAVE_TYPE(HEADER) header;
        struct {
            struct hvm_save_descriptor is;
            HVM_SAVE_TYPE(CPU) cpu;
        } vcpu[];
    } *state;
    size_t size = sizeof(*state) + vcpus * sizeof(state->vcpu[0]) + sizeof(struct hvm_save_descriptor);

    state = calloc(1, size); /* the END record at its end is all zero */
    need(state != NULL, "calloc");
    state->header_is.typecode = HVM_SAVE_CODE(HEADER);
    state->header_is.length = HVM_SAVE_LENGTH(HEADER);
    state->header.magic = HVM_FILE_MAGIC;
    state->header.version = HVM_FILE_VERSION;
    for (unsigned int i = 0; i < vcpus; i++) {
        HVM_SAVE_TYPE(CPU) *cpu = &state->vcpu[i].cpu;

        state->vcpu[i].is.typecode = HVM_SAVE_CODE(CPU);
        state->vcpu[i].is.instance = i;
        state->vcpu[i].is.length = HVM_SAVE_LENGTH(CPU);
        /* 32-bit protected mode with flat segments, as a PVH kernel is entered (docs/misc/pvh.pandoc). */
        cpu->cr0 = 0x11;
        cpu->cs_limit = cpu->ds_limit = cpu->es_limit = cpu->ss_limit = 0xffffffff;
        cpu->cs_arbytes = 0xc9b;
        cpu->ds_arbytes = cpu->es_arbytes = cpu->ss_arbytes = 0xc93;
        cpu->tr_limit = 0x67;
        cpu->tr_arbytes = 0x8b;
        cpu->rflags = 2;
        cpu->dr6 = 0xffff0ff0;
        cpu->dr7 = 0x400;
        cpu->rip = (uint64_t)KERNEL_FRAME << XC_PAGE_SHIFT;
        cpu->rbx = (uint64_t)DIRECTORY_FRAME << XC_PAGE_SHIFT;
        cpu->rsi = ((uint64_t)COUNTS_FRAME << XC_PAGE_SHIFT) + i * sizeof(uint32_t);
    }
    need(!xc_domain_hvm_setcontext(xch, domid, (uint8_t *)state, size), "xc_domain_hvm_setcontext");
    free(state);
}

static void pin(xc_interface *xch, uint32_t domid, unsigned int vcpu)
{
    xc_cpumap_t cpu = xc_cpumap_alloc(xch);

    need(cpu != NULL, "xc_cpumap_alloc");
    cpu[vcpu / 8] = 1 << vcpu % 8;
    need(!xc_vcpu_setaffinity(xch, domid, vcpu, cpu, NULL, XEN_VCPUAFFINITY_HARD), "xc_vcpu_setaffinity");
    free(cpu);
}

static void create(xc_interface *xch, unsigned int vcpus)
{
    uint32_t domid = created(xch, vcpus);

    need(!xc_domain_max_vcpus(xch, domid, vcpus), "xc_domain_max_vcpus");
    populate(xch, domid);
    set_registers(xch, domid, vcpus);
    for (unsigned int vcpu = 0; vcpu < vcpus; vcpu++)
        pin(xch, domid, vcpu);
    need(!xc_domain_unpause(xch, domid), "xc_domain_unpause");
    printf("%u\n", domid);
}

static void rounds(xc_interface *xch, uint32_t domid, unsigned int vcpus)
{
    const volatile uint32_t *counts = xc_map_foreign_range(xch, domid, XC_PAGE_SIZE, PROT_READ, COUNTS_FRAME);

    need(counts != NULL, "xc_map_foreign_range");
    for (unsigned int vcpu = 0; vcpu < vcpus; vcpu++)
        printf("%u\n", counts[vcpu]);
}

static void dump(xc_interface *xch, uint32_t domid, const char *file)
{
    need(!xc_domain_pause(xch, domid), "xc_domain_pause");
    need(!xc_domain_dumpcore(xch, domid, file), "xc_domain_dumpcore");
    need(!xc_domain_unpause(xch, domid), "xc_domain_unpause");
}

int main(int argc, char **argv)
{
    xc_interface *xch = xc_interface_open(NULL, NULL, 0);

    need(xch != NULL, "xc_interface_open");
    if (argc == 3 && !strcmp(argv[1], "create"))
        create(xch, strtoul(argv[2], NULL, 10));
    else if (argc == 4 && !strcmp(argv[1], "rounds"))
        rounds(xch, strtoul(argv[2], NULL, 10), strtoul(argv[3], NULL, 10));
    else if (argc == 4 && !strcmp(argv[1], "dump"))
        dump(xch, strtoul(argv[2], NULL, 10), argv[3]);
    else {
        fprintf(stderr, "usage: domu create VCPUS | domu rounds DOMID VCPUS | domu dump DOMID FILE\n");
        return 2;
    }
    xc_interface_close(xch);
    return 0;
}
