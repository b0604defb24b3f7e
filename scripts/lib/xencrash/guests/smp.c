/*
 * smp.c - the shootdown's NMI, and how a CPU is taken out of the machine.
 */
#include "xen.h"
#include "fault.h"

/* To those that are online, one by one: a shorthand would reach parked CPUs too. */
noinline void smp_send_nmi_allbutself(void)
{
    unsigned int cpu;

    for_each_cpu ( cpu, &cpu_online_map )
        if ( cpu != smp_processor_id() )
            step ( SEND_NMI, cpu )
                send_IPI(x86_cpu_to_apicid[cpu], ICR_NMI);
}

noinline void __stop_this_cpu(void)
{
    unsigned int cpu = smp_processor_id();

    disable_local_APIC();
    asm volatile ( "fninit" );
    step ( GO_OFFLINE, cpu )
        cpumask_clear_cpu(cpu, &cpu_online_map);
}
