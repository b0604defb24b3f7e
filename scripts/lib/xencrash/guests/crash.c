/*
 * crash.c - the shootdown: every other CPU is stopped by an NMI, and the crashing CPU made safe from its own.
 *
 * What this promises, whatever the generation, from machine_crash_shutdown() on:
 *
 *   The crashing CPU must not be disturbed. An NMI or a machine check on it leads nowhere: the NMI gate to
 *   trap_nop, IST off, so that a nested one does not overwrite the frame of the first.
 *
 *   Each other CPU comes to do_nmi_crash() once. It saves its registers, stops its local APIC, says so, and
 *   halts. NMIs stay blocked there, because the handler never returns. A machine check would return, with an
 *   IRET, and that unblocks NMIs: so a self-NMI is queued beforehand, to bring it back here.
 *
 *   Nobody waits forever: after a second the crashing CPU goes on without those that did not answer.
 *
 * How the others come to do_nmi_crash() is what the generations differ in most: the rows HOOKS_... of
 * generation.h. Where a fault can come in, the step has a name (fault.h).
 */
#include "xen.h"
#include "fault.h"

/* Kept by the compiler only where it is read, as in Xen. */
static unsigned int crashing_cpu;

#if WAITS_FOR_COUNTER
static volatile int waiting_for_crash_ipi;
#else
static cpumask_t waiting_to_crash;
#endif

#if HARDENED
DEFINE_PER_CPU(bool, crash_save_done);
#endif

inline void sign_off(unsigned int cpu)
{
#if WAITS_FOR_COUNTER && SIGNS_OFF
    asm volatile ( "lock decl %0" : "+m" (waiting_for_crash_ipi) :: "memory" );
#elif !WAITS_FOR_COUNTER
    cpumask_clear_cpu(cpu, &waiting_to_crash);
#endif
}

/* -- Each other CPU --------------------------------------------------------------------------------- */

/* Interrupts are off and NMIs blocked, so this is for good. */
static inline noreturn void park(unsigned int cpu)
{
    bool halts = false;

    reached(PARK, cpu);
    step ( HALT, cpu )
        halts = true;
    while ( !halts )
        asm volatile ( "pause" );
    for ( ; ; )
        halt();
}

#if HARDENED

#if HOOKS_CALLBACK
static noinline int do_nmi_crash(const struct cpu_user_regs *regs, int this)
#else
noinline void do_nmi_crash(struct cpu_user_regs *regs)
#endif
{
    unsigned int cpu = smp_processor_id();
    bool again = false;

#if !OWN_GATE_TRAP_NOP
    step ( IGNORE_OWN_NMI, cpu )
        if ( cpu == crashing_cpu )
            return 1;
#endif

    step ( SEE_SAVE_DONE, cpu )
        again = this_cpu(crash_save_done);      /* a machine check has returned, and opened NMIs */

    reached(NMI_TAKEN, cpu);
    if ( !REWRITES_GATES )
        step ( MC_IST_OFF, cpu )
            set_ist(&idt_of(cpu)[VECTOR_MC], IST_NONE);

    if ( !again )
    {
        step ( SAVE_REGISTERS, cpu )
            kexec_crash_save_cpu();
        step ( STOP, cpu )
            __stop_this_cpu();
        step ( SAVE_DONE, cpu )
            this_cpu(crash_save_done) = true;
        step ( SIGN_OFF, cpu )
            sign_off(cpu);
    }
    step ( SELF_NMI, cpu )
        send_self_nmi(0);

    park(cpu);
}

#else /* !HARDENED */

static noinline int crash_nmi_callback(const struct cpu_user_regs *regs, int cpu)
{
    step ( IGNORE_OWN_NMI, cpu )
        if ( cpu == crashing_cpu )
            return 1;

    reached(NMI_TAKEN, cpu);
    local_irq_disable();
    step ( SAVE_REGISTERS, cpu )
        kexec_crash_save_cpu();
    step ( STOP, cpu )
        __stop_this_cpu();
    step ( SIGN_OFF, cpu )
        sign_off(cpu);

    park(cpu);
}

#endif

/* -- The crashing CPU ------------------------------------------------------------------------------- */

static void arm_bookkeeping(unsigned int cpu)
{
#if WAITS_FOR_COUNTER
    waiting_for_crash_ipi = cpumask_weight(&cpu_online_map) - 1;
#else
    waiting_to_crash = cpu_online_map;
    cpumask_clear_cpu(cpu, &waiting_to_crash);
#endif
}

int waited_for(void)
{
#if WAITS_FOR_COUNTER
    return waiting_for_crash_ipi;
#else
    cpumask_t mask = *(volatile cpumask_t *)&waiting_to_crash;

    return cpumask_weight(&mask);
#endif
}

#if HARDENED
/* The crashing CPU's own gates. */
static void make_own_gates_safe(unsigned int cpu)
{
    idt_entry_t *idt = idt_of(cpu);

    if ( REWRITES_GATES )
    {
        set_ist(&idt[VECTOR_NMI], IST_NONE);
        step ( OWN_MC_IST_OFF, cpu )
            set_ist(&idt[VECTOR_MC], IST_NONE);
        _set_gate(&idt[VECTOR_NMI], INTERRUPT_GATE, 0, trap_nop);
        return;
    }
#if OWN_GATE_TRAP_NOP
    _set_gate_lower(&idt[VECTOR_NMI], INTERRUPT_GATE, 0, trap_nop);
#endif
    step ( OWN_MC_IST_OFF, cpu )
        set_ist(&idt[VECTOR_MC], IST_NONE);
}
#endif

#if HOOKS_GATES
/* Another CPU's gates, from here, while it runs. */
static void hook_gates(unsigned int cpu)
{
    idt_entry_t *idt = idt_of(cpu);

    if ( REWRITES_GATES )
    {
        set_ist(&idt[VECTOR_NMI], IST_NONE);
        step ( MC_IST_OFF, cpu )
            set_ist(&idt[VECTOR_MC], IST_NONE);
    }
    step ( HOOK_NMI, cpu )
    {
        if ( REWRITES_GATES )
            _set_gate(&idt[VECTOR_NMI], INTERRUPT_GATE, 0, nmi_crash);
        else
            _update_gate_addr_lower(&idt[VECTOR_NMI], nmi_crash);
    }
}
#endif

static void install_hook(unsigned int cpu)
{
#if HOOKS_GATES
    for ( unsigned int i = 0; i < nr_cpu_ids; i++ )
        if ( i == cpu )
            make_own_gates_safe(i);
        else if ( idt_of(i) )
            hook_gates(i);
#elif HOOKS_EXCEPTION_TABLE
    make_own_gates_safe(cpu);
    /* Xen maps the table read-only; the directmap shows the same page. */
    step ( HOOK_NMI, cpu )
        *(exception_handler_t **)__va(image_pa(&exception_table[VECTOR_NMI])) = do_nmi_crash;
#else
# if HARDENED
    make_own_gates_safe(cpu);
    step ( HOOK_NMI, cpu )
        set_nmi_callback(do_nmi_crash);
# else
    step ( HOOK_NMI, cpu )
        set_nmi_callback(crash_nmi_callback);
# endif
#endif
}

static void report_shootdown(void)
{
#if REPORTS_SHOOTDOWN
    const char *separator = "";
    unsigned int cpu;

    if ( cpumask_empty(&waiting_to_crash) )
    {
        printk("Shot down all CPUs\n");
        return;
    }
    printk("Failed to shoot down CPUs {");
    for_each_cpu ( cpu, &waiting_to_crash )
    {
        printk("%s%u", separator, cpu);
        separator = ",";
    }
    printk("}\n");
#endif
}

/* The crashing CPU itself, and what the platform sends to it. */
static void stop_self(unsigned int cpu)
{
    __stop_this_cpu();
    step ( SET_X2APIC_ENABLED, cpu )
        x2apic_enabled = current_local_apic_mode() == APIC_MODE_X2APIC;
    disable_IO_APIC();
}

static void nmi_shootdown_cpus(void)
{
    unsigned int cpu = smp_processor_id();

    step ( DISABLE_INTERRUPTS, cpu )
        local_irq_disable();
    crashing_cpu = cpu;
    irq_stat[cpu].__local_irq_count = 0;

    arm_bookkeeping(cpu);
    install_hook(cpu);
    reached(HOOKED, cpu);

    smp_send_nmi_allbutself();
    reached(NMI_SENT, cpu);

    step ( WAIT, cpu )
        for ( unsigned int milliseconds = 1000; waited_for() > 0 && milliseconds; milliseconds-- )
            mdelay(1);
    report_shootdown();

    step ( STOP_SELF, cpu )
        stop_self(cpu);
}

void machine_crash_shutdown(void)
{
    struct crash_xen_info *info;

    nmi_shootdown_cpus();

    info = kexec_crash_save_info();
    step ( INFO_NOTE, smp_processor_id() )
        info->xen_phys_start = xen_phys_start;
}
