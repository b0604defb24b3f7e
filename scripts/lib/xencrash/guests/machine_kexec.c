/*
 * machine_kexec.c - the last steps in Xen: nothing may go wrong between here and the crash image.
 *
 * From now on a machine check leads nowhere, on whichever CPU: its gate goes to trap_nop, so that none that
 * is parked runs a handler while the crash image takes the machine over. Then NMIs are unblocked, in case the
 * crash happened in an NMI handler: the crash image could not open them, and would have no watchdog.
 */
#include "xen.h"
#include "fault.h"

#if HARDENED

/* Each table that there is, by CPU number. */
static idt_entry_t *existing_idt(unsigned int cpu)
{
    /* The address of an absent CPU's pointer leads nowhere; 4.21.0 reads it all the same. */
    if ( !READS_ABSENT_IDTS && __per_cpu_offset[cpu] == INVALID_PERCPU_AREA )
        return NULL;
    return idt_of(cpu);
}

static void neutralise_machine_checks(void)
{
    if ( REWRITES_GATES )
    {
        step ( NEUTRALISE_MC, smp_processor_id() )
            set_intr_gate(VECTOR_MC, trap_nop);
        return;
    }
    for ( unsigned int cpu = 0; cpu < nr_cpu_ids; cpu++ )
    {
        idt_entry_t *idt = existing_idt(cpu);

        if ( idt )
            step ( NEUTRALISE_MC, cpu )
                _update_gate_addr_lower(&idt[VECTOR_MC], trap_nop);
    }
}

#endif

noinline void machine_kexec(void)
{
    unsigned int cpu = smp_processor_id();

    local_irq_disable();                        /* again: 2de77fa3cd */
#if HARDENED
    neutralise_machine_checks();
    reached(MC_NEUTRALISED, cpu);
    step ( UNBLOCK_NMIS, cpu )
        enable_nmis();
#endif

    step ( JUMP, cpu )
        kexec_reloc(CRASH_IMAGE_START, image_pa(boot_pg_table), options.exit ? CRASH_IMAGE_EXITS : 0);
    for ( ; ; )                                 /* a jump does not come back */
        halt();
}
