/*
 * traps.c - descriptor tables of each CPU, the helpers that change a gate, and what exceptions lead to.
 *
 * The helpers are the crash path's tools, and how many stores each makes is part of what it promises: a gate
 * that another CPU may use at any moment must be whole at every moment.
 */
#include "xen.h"
#include "fault.h"

/* -- Gates: SDM vol. 3, "64-Bit Mode IDT" ----------------------------------------------------------- */

/* One store, and no compiler may make it two. */
static void _write_gate_lower(idt_entry_t *gate, uint64_t lower)
{
    *(volatile uint64_t *)&gate->a = lower;
}

/* The whole gate in three stores. In between it is not present: no gate for a CPU that runs. */
void _set_gate(idt_entry_t *gate, unsigned int type, unsigned int dpl, void (*handler)(void))
{
    _write_gate_lower(gate, 0);
    *(volatile uint64_t *)&gate->b = (uint64_t)handler >> 32;
    _write_gate_lower(gate, gate_lower(HYPERVISOR_CS, type, dpl, handler));
}

/* The lower half anew, so IST is off. The upper half is the same for every handler in the image. */
void _set_gate_lower(idt_entry_t *gate, unsigned int type, unsigned int dpl, void (*handler)(void))
{
    _write_gate_lower(gate, gate_lower(HYPERVISOR_CS, type, dpl, handler));
}

/* Another handler; type, privilege level and IST stay. */
void _update_gate_addr_lower(idt_entry_t *gate, void (*handler)(void))
{
    uint64_t offset = (uint64_t)handler;
    uint64_t kept = gate->a & 0x0000ffffffff0000;

    _write_gate_lower(gate, kept | (offset & 0xffff) | (offset & 0xffff0000) << 32);
}

void set_ist(idt_entry_t *gate, unsigned int ist)
{
#if SETS_IST_AS_BYTE
    step ( SET_IST_AS_BYTE, smp_processor_id() )
    {
        ((volatile uint8_t *)gate)[GATE_IST_SHIFT / 8] = ist;
        return;
    }
#endif
    _write_gate_lower(gate, (gate->a & ~GATE_IST_MASK) | (uint64_t)ist << GATE_IST_SHIFT);
}

/* -- Tables ----------------------------------------------------------------------------------------- */

#define TABLE_ALIGNED   __attribute__((aligned(PAGE_SIZE)))

#if HAS_PER_CPU_IDT
idt_entry_t bsp_idt[IDT_ENTRIES] TABLE_ALIGNED __attribute__((section(".data.page_aligned")));
DEFINE_PER_CPU(idt_entry_t *, idt);
# define MASTER_IDT bsp_idt
#else
idt_entry_t idt_table[IDT_ENTRIES] TABLE_ALIGNED;
idt_entry_t *idt_tables[NR_CPUS] = { idt_table };
# define MASTER_IDT idt_table
#endif

idt_entry_t *idt_of(unsigned int cpu)
{
#if HAS_PER_CPU_IDT
    return per_cpu(idt, cpu);
#else
    return idt_tables[cpu];
#endif
}

static void set_idt_of(unsigned int cpu, idt_entry_t *table)
{
#if HAS_PER_CPU_IDT
    per_cpu(idt, cpu) = table;
#else
    idt_tables[cpu] = table;
#endif
}

/* An interrupt gate for everyone: the CPUs that have their own table, then the master table. */
void set_intr_gate(unsigned int vector, void (*handler)(void))
{
#if !HAS_PER_CPU_IDT
    for ( unsigned int cpu = 1; cpu < nr_cpu_ids; cpu++ )
        if ( idt_tables[cpu] )
            _set_gate(&idt_tables[cpu][vector], INTERRUPT_GATE, 0, handler);
#endif
    _set_gate(&MASTER_IDT[vector], INTERRUPT_GATE, 0, handler);
}

void console_interrupt(void);
void vm_exit_interrupt(void);
void spurious_interrupt(void);
extern void (*const exception_stubs[FIRST_IRQ_VECTOR])(void);

void trap_init(void)
{
    for ( unsigned int vector = 0; vector < FIRST_IRQ_VECTOR; vector++ )
        set_intr_gate(vector, exception_stubs[vector]);
    for ( unsigned int vector = FIRST_IRQ_VECTOR; vector < IDT_ENTRIES; vector++ )
        set_intr_gate(vector, spurious_interrupt);
    set_intr_gate(CONSOLE_VECTOR, console_interrupt);
    set_intr_gate(VM_EXIT_VECTOR, vm_exit_interrupt);

    set_intr_gate(VECTOR_DB, debug);
    set_intr_gate(VECTOR_NMI, nmi);
    set_intr_gate(VECTOR_DF, double_fault);
    set_intr_gate(VECTOR_MC, machine_check);
    set_ist(&MASTER_IDT[VECTOR_DB], IST_DB);
    set_ist(&MASTER_IDT[VECTOR_NMI], IST_NMI);
    set_ist(&MASTER_IDT[VECTOR_DF], IST_DF);
    set_ist(&MASTER_IDT[VECTOR_MC], IST_MCE);

    set_idt_of(0, MASTER_IDT);
}

/* A CPU's own table begins as a copy of the master. */
void alloc_idt(unsigned int cpu)
{
    set_idt_of(cpu, memcpy(alloc_xenheap(PAGE_SIZE), MASTER_IDT, sizeof(MASTER_IDT)));
}

/* SDM vol. 3, "64-Bit TSS". */
struct tss {
    uint32_t reserved0;
    uint64_t rsp[3], reserved1, ist[7], reserved2;
    uint16_t reserved3, io_map_base;
} __attribute__((packed));

#if HAS_TSS_PAGE
struct tss_page { struct tss tss; } TABLE_ALIGNED;
__attribute__((section(".bss.percpu.page_aligned"))) struct tss_page per_cpu__tss_page;
# define this_tss() (&this_cpu(tss_page).tss)
#else
DEFINE_PER_CPU(struct tss, init_tss);
# define this_tss() (&this_cpu(init_tss))
#endif

#define GDT_ENTRIES     16
DEFINE_PER_CPU(uint64_t, gdt_table)[GDT_ENTRIES];

/* Unused stack pointers point here: non-canonical, so that their use cannot go unnoticed. */
#define POISON_STACK    0x8600111111111111UL

static void init_tss(struct tss *tss, unsigned long stack)
{
    /* Xen's has es, ds, fs and gs above ss, and points to them: what the processor pushes ends with ss. */
    tss->rsp[0] = (unsigned long)get_cpu_info() + sizeof(struct cpu_user_regs);
    tss->rsp[1] = tss->rsp[2] = POISON_STACK;
    for ( unsigned int i = 0; i < ARRAY_SIZE(tss->ist); i++ )
        tss->ist[i] = POISON_STACK;
    for ( unsigned int ist = 1; ist <= (IST_DB ? 4 : 3); ist++ )
        tss->ist[ist - 1] = stack + (IST_FIRST_PAGE + ist) * PAGE_SIZE;
    tss->io_map_base = sizeof(*tss);
}

/* GDT, TSS and IDT of the CPU that calls. */
void load_system_tables(void)
{
    unsigned int cpu = smp_processor_id();
    struct tss *tss = this_tss();
    unsigned long base = (unsigned long)tss;
    uint64_t *gdt = this_cpu(gdt_table);
    struct table_register gdtr = {
        .limit = FIRST_RESERVED_SELECTOR + GDT_ENTRIES * 8 - 1,
        .base = (unsigned long)gdt - FIRST_RESERVED_SELECTOR,
    };
    struct table_register idtr = { .limit = IDT_ENTRIES * sizeof(idt_entry_t) - 1, .base = (unsigned long)idt_of(cpu) };
    unsigned int tss_slot = (HYPERVISOR_TSS - FIRST_RESERVED_SELECTOR) / 8;

    init_tss(tss, (unsigned long)(get_cpu_info() + 1) - STACK_SIZE);

    /* SDM vol. 3, "TSS Descriptor in 64-bit mode": present, 64-bit TSS (available). */
    gdt[(HYPERVISOR_CS - FIRST_RESERVED_SELECTOR) / 8] = SEGMENT_CODE64;
    gdt[(HYPERVISOR_DS - FIRST_RESERVED_SELECTOR) / 8] = SEGMENT_DATA;
    gdt[tss_slot] = (sizeof(*tss) - 1) | (base & 0xffffff) << 16 | 0x89UL << 40 | (base >> 24 & 0xff) << 56;
    gdt[tss_slot + 1] = base >> 32;

    asm volatile ( "lgdt %0                 \n\t"
                   "pushq %2                \n\t"
                   "lea  1f(%%rip), %%rax   \n\t"
                   "push %%rax              \n\t"
                   "lretq                   \n\t"
                   "1:                      \n\t"
                   "ltr  %w3                \n\t"
                   "lidt %1"
                   :: "m" (gdtr), "m" (idtr), "i" (HYPERVISOR_CS), "r" (HYPERVISOR_TSS) : "rax", "memory" );
    reached(TABLES_LOADED, cpu);
}

/* -- Exceptions ------------------------------------------------------------------------------------- */

irq_cpustat_t irq_stat[NR_CPUS];

#if HAS_EXCEPTION_TABLE
static int dummy_nmi_callback(const struct cpu_user_regs *regs, int cpu)
{
    return 0;
}

static nmi_callback_t *nmi_callback = dummy_nmi_callback;
#else
static nmi_callback_t *nmi_callback;
DEFINE_PER_CPU(unsigned int, nmi_count);
#endif

nmi_callback_t *set_nmi_callback(nmi_callback_t *callback)
{
    nmi_callback_t *old = nmi_callback;

    nmi_callback = callback;
    return old;
}

/* An NMI that nobody asked for has no handler here: it is counted, and that is all. */
void do_nmi(struct cpu_user_regs *regs)
{
    unsigned int cpu = smp_processor_id();
    nmi_callback_t *callback = *(nmi_callback_t *volatile *)&nmi_callback;

#if COUNTS_NMI_NESTING
    this_cpu(nmi_count)++;
    irq_stat[cpu].nmi_count++;
#else
    irq_stat[cpu].__nmi_count++;
#endif

    if ( !callback || !callback(regs, cpu) )
        nmi_before_the_crash(cpu);

#if COUNTS_NMI_NESTING
    irq_stat[cpu].nmi_count--;
#endif
}

/* As VMX's handler of VM exits did with an NMI until 4.5.0: past the gate (7dd3b06ff0; fixed by d3eb16b8a7). */
void do_vm_exit_nmi(struct cpu_user_regs *regs)
{
    ack_APIC_irq();
    do_nmi(regs);
}

void do_machine_check(struct cpu_user_regs *regs)
{
    panic("machine check at %lx", regs->rip);
}

void do_trap(struct cpu_user_regs *regs)
{
    panic("exception %u, error code %x, at %lx", regs->entry_vector, regs->error_code, regs->rip);
}

#if HAS_EXCEPTION_TABLE
exception_handler_t *const exception_table[FIRST_IRQ_VECTOR] = {
    [0 ... VECTOR_NMI - 1] = do_trap,
    [VECTOR_NMI] = do_nmi,
    [VECTOR_NMI + 1 ... VECTOR_MC - 1] = do_trap,
    [VECTOR_MC] = do_machine_check,
    [VECTOR_MC + 1 ... FIRST_IRQ_VECTOR - 1] = do_trap,
};
#endif

void do_console_irq(void)
{
    ack_APIC_irq();
    console_listen();
}
