/*
 * machine_kexec.c - the last steps in Xen: nothing may go wrong between here and the crash image.
 *
 * From now on a machine check leads nowhere, on whichever CPU: its gate goes to trap_nop, so that none that
 * is parked runs a handler while the crash image takes the machine over. Then NMIs are opened, in case the
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
    if ( faulty(MC_NOT_SWAPPED) )
        return;
    if ( REWRITES_GATES && !faulty(MC_SWAPPED_ON_CRASHER) )
    {
        set_intr_gate(VECTOR_MC, trap_nop);
        return;
    }
    for ( unsigned int cpu = 0; cpu < nr_cpu_ids; cpu++ )
    {
        idt_entry_t *idt = existing_idt(cpu);

        if ( !idt || (faulty(MC_SWAPPED_ON_CRASHER) && cpu != smp_processor_id()) )
            continue;
        if ( faulty(MC_REWRITTEN) )
            _set_gate(&idt[VECTOR_MC], INTERRUPT_GATE, 0, trap_nop);
        else
            _update_gate_addr_lower(&idt[VECTOR_MC], trap_nop);
    }
}

#endif

noinline void machine_kexec(void)
{
#if HARDENED
    neutralise_machine_checks();
    spoil_mc_gate();
    if ( !faulty(NMIS_LATCHED) && !faulty(ENABLE_NMIS_SKIPPED) )
        enable_nmis();
#endif

    if ( faulty(NO_JUMP) )
        for ( ; ; )
            halt();

    kexec_reloc(CRASH_IMAGE_START, image_pa(boot_pg_table), options.exit ? CRASH_IMAGE_EXITS : 0);
}
