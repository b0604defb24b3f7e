/*
 * xen.h - the guest's types and functions. Names are Xen's wherever Xen has the thing.
 */
#ifndef XEN_H
#define XEN_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"
#include "machine.h"

/* Everything is in one image: addresses are relative to RIP, without a table of them in between. */
#pragma GCC visibility push(hidden)

#define noinline        __attribute__((noinline))
#define noreturn        __attribute__((noreturn))
#define ARRAY_SIZE(a)   (sizeof(a) / sizeof((a)[0]))
#define PRINTF(f, a)    __attribute__((format(printf, f, a)))

/* -- Memory ---------------------------------------------------------------------------------------- */

#define __va(physical)  ((void *)((unsigned long)(physical) + DIRECTMAP_START))
/* Of something in the image, not in the directmap. */
#define image_pa(address) PHYSICAL((unsigned long)(address))

extern unsigned long xen_phys_start;

void *alloc_xenheap(size_t size);               /* zeroed, aligned to the power of two at or above its size */
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
bool streq(const char *a, const char *b);

/* -- CPUs ------------------------------------------------------------------------------------------ */

typedef struct { uint64_t bits[NR_CPUS / 64]; } cpumask_t;

static inline bool cpumask_test_cpu(unsigned int cpu, const cpumask_t *mask)
{
    return *(volatile const uint64_t *)&mask->bits[cpu / 64] >> cpu % 64 & 1;
}

static inline void cpumask_set_cpu(unsigned int cpu, cpumask_t *mask)
{
    asm volatile ( "lock btsq %1, %0" : "+m" (mask->bits[cpu / 64]) : "r" ((uint64_t)cpu % 64) : "memory" );
}

static inline void cpumask_clear_cpu(unsigned int cpu, cpumask_t *mask)
{
    asm volatile ( "lock btrq %1, %0" : "+m" (mask->bits[cpu / 64]) : "r" ((uint64_t)cpu % 64) : "memory" );
}

bool cpumask_empty(const cpumask_t *mask);
bool cpumask_equal(const cpumask_t *a, const cpumask_t *b);
unsigned int cpumask_weight(const cpumask_t *mask);

#define for_each_cpu(cpu, mask)                        \
    for ( (cpu) = 0; (cpu) < nr_cpu_ids; (cpu)++ )     \
        if ( cpumask_test_cpu(cpu, mask) )

extern unsigned int nr_cpu_ids;
extern cpumask_t cpu_present_map, cpu_online_map;
extern uint32_t x86_cpu_to_apicid[NR_CPUS];
#define BAD_APICID      0xffffffffU

/* What an entry stub leaves on the stack. The processor pushes what begins with rip. */
struct cpu_user_regs {
    uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
    uint32_t error_code, entry_vector;
    uint64_t rip, cs, rflags, rsp, ss;
};
_Static_assert(offsetof(struct cpu_user_regs, rip) == 128, "known to entry.S");

/* The top of each CPU's stack. The fields kept are at Xen's offsets from the end. */
struct cpu_info {
    uint8_t before[CPU_INFO_SIZE - CPU_INFO_ID];
    uint32_t processor_id, verw_selector;
    void *current_vcpu;
    unsigned long per_cpu_offset;
    uint8_t after[CPU_INFO_ID - 24];
};
_Static_assert(sizeof(struct cpu_info) == CPU_INFO_SIZE, "generation.h");

static inline struct cpu_info *get_cpu_info(void)
{
    unsigned long rsp;

    asm ( "mov %%rsp, %0" : "=r" (rsp) );
    return (struct cpu_info *)((rsp | (STACK_SIZE - 1)) + 1) - 1;
}

static inline unsigned int smp_processor_id(void) { return get_cpu_info()->processor_id; }

/*
 * Per-CPU data: a template in .bss, which CPU 0 uses in place; every other CPU has an area like it on the
 * heap, at a distance kept in __per_cpu_offset[]. The distance of an absent CPU leads nowhere.
 */
#define DEFINE_PER_CPU(type, name)  __attribute__((section(".bss.percpu"))) type per_cpu__ ## name
#define DECLARE_PER_CPU(type, name) extern type per_cpu__ ## name
#define per_cpu_at(name, offset)    (*(typeof(per_cpu__ ## name) *)((unsigned long)&per_cpu__ ## name + (offset)))
#define per_cpu(name, cpu)          per_cpu_at(name, __per_cpu_offset[cpu])
#define this_cpu(name)              per_cpu_at(name, get_cpu_info()->per_cpu_offset)

extern char __per_cpu_start[], __per_cpu_data_end[];
extern unsigned long __per_cpu_offset[NR_CPUS];
#define INVALID_PERCPU_AREA ((POISONS_PERCPU ? 0x8000000000000000UL : 0) - (unsigned long)__per_cpu_start)

/* The interrupt counters of one CPU. 0xc: the total until 4.13, how deeply NMIs are nested since. */
typedef struct {
    uint64_t __softirq_pending;
    uint32_t __local_irq_count;
#if COUNTS_NMI_NESTING
    uint32_t nmi_count;
#else
    uint32_t __nmi_count;
#endif
    uint32_t mce_count;
} __attribute__((aligned(128))) irq_cpustat_t;

extern irq_cpustat_t irq_stat[NR_CPUS];

void percpu_init_areas(void);
unsigned long percpu_alloc_area(unsigned int cpu);
void init_cpu_info(unsigned int cpu, void *stack);

/* -- Descriptor tables (traps.c) ------------------------------------------------------------------- */

#define IDT_ENTRIES     256
#define IST_NONE        0

#if HAS_PER_CPU_IDT
DECLARE_PER_CPU(idt_entry_t *, idt);
#else
extern idt_entry_t *idt_tables[NR_CPUS];
#endif
idt_entry_t *idt_of(unsigned int cpu);          /* NULL for a CPU without one */

void set_intr_gate(unsigned int vector, void (*handler)(void));
void set_ist(idt_entry_t *gate, unsigned int ist);
void _set_gate_lower(idt_entry_t *gate, unsigned int type, unsigned int dpl, void (*handler)(void));
void _update_gate_addr_lower(idt_entry_t *gate, void (*handler)(void));
void _set_gate(idt_entry_t *gate, unsigned int type, unsigned int dpl, void (*handler)(void));

void trap_init(void);
void alloc_idt(unsigned int cpu);
void load_system_tables(void);

/* entry.S */
#if HAS_ENTRY_NAMES
# define nmi            entry_NMI
# define machine_check  entry_MC
# define double_fault   entry_DF
# define debug          entry_DB
#endif
void nmi(void);
void machine_check(void);
void double_fault(void);
void debug(void);
void trap_nop(void);
void nmi_crash(void);
#if HAS_ENABLE_NMIS
void enable_nmis(void);
#else
/* IRET unblocks NMIs: SDM vol. 3, "Handling Multiple NMIs". This one returns to the next instruction. */
static inline void enable_nmis(void)
{
    unsigned long scratch;

    asm volatile ( "mov   %%rsp, %[scratch]  \n\t"
                   "pushq $0                 \n\t"   /* SS: null is fine in ring 0 */
                   "push  %[scratch]         \n\t"
                   "pushfq                   \n\t"
                   "pushq %[cs]              \n\t"
                   "lea   1f(%%rip), %[scratch] \n\t"
                   "push  %[scratch]         \n\t"
                   "iretq                    \n\t"
                   "1:"
                   : [scratch] "=&r" (scratch) : [cs] "i" (HYPERVISOR_CS) : "memory" );
}
#endif

typedef int nmi_callback_t(const struct cpu_user_regs *regs, int cpu);
nmi_callback_t *set_nmi_callback(nmi_callback_t *callback);
void do_nmi(struct cpu_user_regs *regs);
void do_vm_exit_nmi(struct cpu_user_regs *regs);
void do_machine_check(struct cpu_user_regs *regs);
void do_trap(struct cpu_user_regs *regs);
void do_console_irq(void);
#if HAS_EXCEPTION_TABLE
typedef void exception_handler_t(struct cpu_user_regs *regs);
extern exception_handler_t *const exception_table[FIRST_IRQ_VECTOR];
#endif

/* -- Local APIC (apic.c) and inter-processor interrupts (smp.c) ------------------------------------- */

enum apic_mode { APIC_MODE_INVALID, APIC_MODE_DISABLED, APIC_MODE_XAPIC, APIC_MODE_X2APIC };

extern bool x2apic_enabled;
enum apic_mode current_local_apic_mode(void);
void record_boot_APIC_mode(void);
void enable_x2apic(void);
bool has_x2apic(void);
void setup_local_APIC(void);
void disable_local_APIC(void);
void disconnect_bsp_APIC(void);
void disable_IO_APIC(void);
void route_console_irq(uint32_t apic_id);
void ack_APIC_irq(void);
uint32_t get_apic_id(void);
void send_IPI(uint32_t apic_id, uint32_t icr);
void send_self_nmi(uint32_t wrong_by);          /* 0, or how far off its own APIC id */

void smp_send_nmi_allbutself(void);
void __stop_this_cpu(void);

/* -- Bring-up, idling, time ------------------------------------------------------------------------ */

void find_cpus(void);                           /* acpi.c */
void smp_boot_cpus(void);                       /* smpboot.c */
void start_secondary(void);
void early_cpu_init(void);
void idle_loop(void) noreturn;                  /* domain.c */
void start_crash(void);
void nmi_before_the_crash(unsigned int cpu);
bool settle(unsigned int cpu);                  /* false for one that has settled before */
void default_idle(void);
void mdelay(unsigned int milliseconds);         /* delay.c */

/* -- Console --------------------------------------------------------------------------------------- */

void console_init(void);
void console_listen(void);
void printk(const char *format, ...) PRINTF(1, 2);
void panic(const char *format, ...) PRINTF(1, 2) noreturn;

/* -- Crash path ------------------------------------------------------------------------------------ */

extern bool kexecing;
extern unsigned long idle_pg_table[512], boot_pg_table[512];

/* The CRASH_INFO note. All but the version and `tainted` are physical addresses; there is no dom0. */
struct crash_xen_info {
    uint64_t xen_major_version, xen_minor_version;
    uint64_t xen_extra_version, xen_changeset, xen_compiler, xen_compile_date, xen_compile_time;
    uint64_t tainted, xen_phys_start, dom0_pfn_to_mfn_frame_list_list;
};

void kexec_init(void);
void kexec_crash(void);
void kexec_crash_save_cpu(void);
struct crash_xen_info *kexec_crash_save_info(void);
void machine_crash_shutdown(void);
void sign_off(unsigned int cpu);
int waited_for(void);                           /* how many have not signed off */
#if HARDENED
DECLARE_PER_CPU(bool, crash_save_done);
#endif
void machine_kexec(void);
void kexec_reloc(unsigned long image, unsigned long page_table, unsigned long flags) noreturn;

void wait_for_crash_image(void);

/* -- Command line ---------------------------------------------------------------------------------- */

extern struct options {
    unsigned int crash_cpu;                     /* crash_cpu=N   who crashes */
    bool crash_by_itself;                       /* crash=auto    as soon as all CPUs are up; else on 'C' */
    bool crash_in_nmi;                          /* context=nmi   from an NMI handler, so that NMIs are latched */
    unsigned int nr_cpu_ids;                    /* nr_cpu_ids=N  as if the firmware listed more CPUs */
    bool x2apic;                                /* x2apic        switch to x2APIC */
    bool firmware_x2apic;                       /* x2apic=firmware  booted in it */
    bool exit;                                  /* exit          the crash image ends the machine */
} options;

#endif /* XEN_H */
