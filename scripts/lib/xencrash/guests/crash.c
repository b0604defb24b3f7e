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
 *   IRET, and that opens NMIs: so one NMI of its own is queued beforehand, to bring it back here.
 *
 *   Nobody waits forever: after a second the crashing CPU goes on without those that did not answer.
 *
 * How the others come to do_nmi_crash() is what the generations differ in most: the rows HOOKS_... of
 * generation.h.
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

static void sign_off(unsigned int cpu)
{
#if WAITS_FOR_COUNTER && SIGNS_OFF
    asm volatile ( "lock decl %0" : "+m" (waiting_for_crash_ipi) :: "memory" );
#elif !WAITS_FOR_COUNTER
    cpumask_clear_cpu(cpu, &waiting_to_crash);
#endif
}

/* -- Each other CPU --------------------------------------------------------------------------------- */

static noinline noreturn void spin(void)
{
    for ( ; ; )
        barrier();
}

/* Interrupts are off and NMIs blocked, so this is for good. */
static inline noreturn void park(unsigned int cpu)
{
    if ( faulty_cpu(NOT_HALTED, cpu) )
        spin();
    if ( faulty_cpu(INTERRUPTS_ON, cpu) )
        local_irq_enable();
    for ( ; ; )
        halt();
}

#if HARDENED

static volatile unsigned int turn;

static inline void await_turn(unsigned int number)
{
    while ( turn < number )
        barrier();
}

/* On the crashing CPU, as the RFC did it, but at the very instant at which the CPU would do it itself. */
static void take_ist_off_remotely(unsigned int cpu)
{
    await_turn(1);
    set_ist(&idt_of(cpu)[VECTOR_MC], IST_NONE);
    turn = 2;
}

/* Off and on again, each for so long that the next CPU gets one step further meanwhile. */
static void take_ist_off_and_on(unsigned int cpu)
{
    set_ist(&idt_of(cpu)[VECTOR_MC], IST_NONE);
    turn = 1;
    await_turn(2);                              /* it has saved its registers */
    set_ist(&idt_of(cpu)[VECTOR_MC], IST_MCE);
    turn = 3;
    while ( cpumask_test_cpu(cpu + 1, &cpu_online_map) )
        barrier();
}

#if HOOKS_CALLBACK
static noinline int do_nmi_crash(const struct cpu_user_regs *regs, int this)
#else
noinline void do_nmi_crash(struct cpu_user_regs *regs)
#endif
{
    unsigned int cpu = smp_processor_id();
    bool again = this_cpu(crash_save_done);     /* a machine check has returned, and opened NMIs */

#if !OWN_GATE_TRAP_NOP
    if ( cpu == crashing_cpu )
        return 1;
#endif

    if ( faulty_cpu(WAIT_ENDS_EARLY, cpu) )
        wait_for_crash_image();

    if ( faulty_cpu(MC_GATE_IST_TWICE, cpu) )
        take_ist_off_and_on(cpu);
    if ( faulty_cpu(MC_GATE_IST_TWICE, cpu - 1) )
        await_turn(1);
    if ( faulty_cpu(MC_GATE_IST_REMOTE, cpu) )
    {
        turn = 1;
        await_turn(2);
    }
    if ( !REWRITES_GATES && !faulty_cpu(MC_GATE_IST, cpu) )
        set_ist(&idt_of(cpu)[VECTOR_MC], IST_NONE);

    if ( faulty_cpu(SIGN_OFF_FIRST, cpu) )
        sign_off(cpu);
    if ( faulty_cpu(SAVE_DONE_EARLY, cpu) )
        this_cpu(crash_save_done) = true;

    if ( !again )
    {
        if ( !faulty_cpu(NOTES_MISSING, cpu) )
            kexec_crash_save_cpu();
        if ( faulty_cpu(MC_GATE_IST_TWICE, cpu - 1) )
        {
            turn = 2;
            await_turn(3);
        }
        __stop_this_cpu();

        this_cpu(crash_save_done) = !faulty_cpu(SAVE_DONE_NEVER, cpu);

        if ( faulty_cpu(SECOND_ENTRY, cpu) )
        {
            enable_nmis();
            send_self_nmi(0);
            spin();                             /* until that NMI, which does the rest */
        }
    }
    if ( (!again || faulty_cpu(SECOND_ENTRY, cpu)) &&
         !faulty_cpu(NO_SIGN_OFF, cpu) && !faulty_cpu(SIGN_OFF_FIRST, cpu) )
        sign_off(cpu);

    if ( !faulty_cpu(NO_SELF_NMI, cpu) )
        send_self_nmi(faulty_cpu(SELF_NMI_MISDIRECTED, cpu) ? 0x20 : 0);

    park(cpu);
}

#else /* !HARDENED */

static noinline int crash_nmi_callback(const struct cpu_user_regs *regs, int cpu)
{
    if ( cpu == crashing_cpu )
        return 1;

    if ( faulty_cpu(WAIT_ENDS_EARLY, cpu) )
        wait_for_crash_image();

    local_irq_disable();
    if ( faulty_cpu(SIGN_OFF_FIRST, cpu) )
        sign_off(cpu);
    if ( !faulty_cpu(NOTES_MISSING, cpu) )
        kexec_crash_save_cpu();
    __stop_this_cpu();
    if ( !faulty_cpu(NO_SIGN_OFF, cpu) && !faulty_cpu(SIGN_OFF_FIRST, cpu) )
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

/* The last that a CPU does before it signs off. */
static inline bool has_stopped(unsigned int cpu)
{
#if HARDENED
    return *(volatile bool *)&per_cpu(crash_save_done, cpu);
#else
    return !cpumask_test_cpu(cpu, &cpu_online_map);
#endif
}

static bool all_signed_off(void)
{
    /* A sign-off that comes too early lets the wait end too early, too: but that is a race, and not shown. */
    if ( faulty(SIGN_OFF_FIRST) && !has_stopped(fault_cpu) )
        return false;
#if WAITS_FOR_COUNTER
    return waiting_for_crash_ipi <= faulty(WAIT_ENDS_EARLY);
#else
    cpumask_t mask = *(volatile cpumask_t *)&waiting_to_crash;

    if ( faulty(WAIT_ENDS_EARLY) )
        cpumask_clear_cpu(fault_cpu, &mask);
    return cpumask_empty(&mask);
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
        if ( !faulty(OWN_MC_GATE_IST) )
            set_ist(&idt[VECTOR_MC], IST_NONE);
        _set_gate(&idt[VECTOR_NMI], INTERRUPT_GATE, 0, trap_nop);
        return;
    }
#if OWN_GATE_TRAP_NOP
    _set_gate_lower(&idt[VECTOR_NMI], INTERRUPT_GATE, 0, trap_nop);
#endif
    if ( !faulty(OWN_MC_GATE_IST) )
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
        if ( !faulty_cpu(MC_GATE_IST, cpu) )
            set_ist(&idt[VECTOR_MC], IST_NONE);
    }
    if ( faulty_cpu(NMI_GATE_NOT_HOOKED, cpu) )
        return;
    if ( REWRITES_GATES )
        _set_gate(&idt[VECTOR_NMI], INTERRUPT_GATE, 0, nmi_crash);
    else
        _update_gate_addr_lower(&idt[VECTOR_NMI], nmi_crash);
}

/* As if the two handlers had been mixed up. */
static void exchange_handlers(unsigned int crashing)
{
    for ( unsigned int cpu = 0; cpu < nr_cpu_ids; cpu++ )
        if ( idt_of(cpu) )
            _update_gate_addr_lower(&idt_of(cpu)[VECTOR_NMI], cpu == crashing ? nmi_crash : trap_nop);
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
    if ( faulty(HANDLERS_EXCHANGED) )
        exchange_handlers(cpu);
#elif HOOKS_EXCEPTION_TABLE
    make_own_gates_safe(cpu);
    /* Xen maps the table read-only; the directmap shows the same page. */
    if ( !faulty(HOOK_MISSING) )
        *(exception_handler_t **)__va(image_pa(&exception_table[VECTOR_NMI])) = do_nmi_crash;
#else
    nmi_callback_t *old = NULL;

# if HARDENED
    make_own_gates_safe(cpu);
    if ( !faulty(HOOK_MISSING) )
        old = set_nmi_callback(do_nmi_crash);
# else
    if ( !faulty(HOOK_MISSING) )
        old = set_nmi_callback(crash_nmi_callback);
# endif
    if ( faulty(HOOK_RESTORED) )
        set_nmi_callback(old);
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
static void stop_self(void)
{
    __stop_this_cpu();
    if ( !faulty(X2APIC_ENABLED_STALE) )
        x2apic_enabled = current_local_apic_mode() == APIC_MODE_X2APIC;
    disable_IO_APIC();
}

static void nmi_shootdown_cpus(void)
{
    unsigned int cpu = smp_processor_id();

    local_irq_disable();
    crashing_cpu = cpu;
    irq_stat[cpu].__local_irq_count = 0;

    arm_bookkeeping(cpu);
    install_hook(cpu);
    spoil_nmi_gate(cpu);
#if HARDENED
    if ( faulty(SAVE_DONE_ON_CRASHER) )
        this_cpu(crash_save_done) = true;
#endif

    smp_send_nmi_allbutself();
#if HARDENED
    if ( faulty(MC_GATE_IST_REMOTE) )
        take_ist_off_remotely(fault_cpu);
#endif
    for ( unsigned int milliseconds = 1000; !all_signed_off() && milliseconds; milliseconds-- )
        mdelay(1);
    report_shootdown();

    if ( !faulty(OWN_STOP_SKIPPED) )
        stop_self();
}

void machine_crash_shutdown(void)
{
    struct crash_xen_info *info;

    nmi_shootdown_cpus();

    info = kexec_crash_save_info();
    if ( !faulty(INFO_NOTE_MISSING) )
        info->xen_phys_start = xen_phys_start;
}
