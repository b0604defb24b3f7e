/*
 * domain.c - what a CPU does that has nothing to do, until one of them crashes.
 */
#include "xen.h"
#include "fault.h"

/* The CPUs that have got as far as they will before the crash. */
static cpumask_t settled;

bool settle(unsigned int cpu)
{
    if ( cpumask_test_cpu(cpu, &settled) )
        return false;
    cpumask_set_cpu(cpu, &settled);
    return true;
}

noinline void default_idle(void)
{
    local_irq_disable();
    safe_halt();
}

/* On the CPU that shall crash, at the word of the command line or of the console. */
void start_crash(void)
{
    if ( options.crash_in_nmi )
        send_IPI(get_apic_id(), ICR_NMI);       /* nmi_before_the_crash() */
    else
        kexec_crash();
}

/* An NMI that is not the shootdown's: one of those that the guest sends for a crash to find it in. */
void nmi_before_the_crash(unsigned int cpu)
{
    if ( options.crash_in_nmi && cpu == options.crash_cpu )
        kexec_crash();
    reached(EARLIER_NMI, cpu);
}

void idle_loop(void)
{
    unsigned int cpu = smp_processor_id();

    step ( SETTLE, cpu )
        settle(cpu);

    if ( cpu == options.crash_cpu )
    {
        while ( !cpumask_equal(&settled, &cpu_present_map) )
            cpu_relax();
        route_console_irq(get_apic_id());
        printk("%u CPUs ready, CPU %u crashes%s\n", cpumask_weight(&cpu_online_map), cpu,
               options.crash_by_itself ? "" : " on 'C'");
        console_listen();
        if ( options.crash_by_itself )
            start_crash();
    }

    for ( ; ; )
        default_idle();
}
