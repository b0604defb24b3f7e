/*
 * smpboot.c - the other CPUs, one after the other: a stack, a per-CPU area and an IDT for each, then INIT and
 * SIPI (SDM vol. 3, "MP Initialization Protocol Algorithm for MP Systems").
 */
#include "xen.h"

unsigned int nr_cpu_ids;
cpumask_t cpu_present_map, cpu_online_map;
uint32_t x86_cpu_to_apicid[NR_CPUS];

/* head.S: where the CPU that is on its way finds its stack. */
unsigned long stack_start;
extern const char ap_start[], ap_start_end[];

#define CALL_IN_MILLISECONDS 2000

void early_cpu_init(void)
{
    if ( options.firmware_x2apic )
        enable_x2apic();
}

static void boot_cpu(unsigned int cpu)
{
    void *stack = alloc_xenheap(STACK_SIZE);

    percpu_alloc_area(cpu);
    alloc_idt(cpu);
    init_cpu_info(cpu, stack);
    stack_start = (unsigned long)stack + STACK_SIZE - sizeof(struct cpu_info);

    send_IPI(x86_cpu_to_apicid[cpu], ICR_INIT | ICR_ASSERT);
    mdelay(1);
    send_IPI(x86_cpu_to_apicid[cpu], ICR_STARTUP | ICR_ASSERT | AP_START_PAGE / PAGE_SIZE);

    for ( unsigned int waited = 0; !cpumask_test_cpu(cpu, &cpu_online_map); waited++ )
    {
        if ( waited == CALL_IN_MILLISECONDS )
            panic("CPU %u did not come up", cpu);
        mdelay(1);
    }
}

void smp_boot_cpus(void)
{
    unsigned int cpu;

    memcpy(__va(AP_START_PAGE), ap_start, ap_start_end - ap_start);
    for_each_cpu ( cpu, &cpu_present_map )
        if ( cpu != smp_processor_id() )
            boot_cpu(cpu);
}

/* From head.S, on a CPU's own stack. */
void start_secondary(void)
{
    load_system_tables();
    early_cpu_init();
    if ( x2apic_enabled )
        enable_x2apic();
    setup_local_APIC();
    cpumask_set_cpu(smp_processor_id(), &cpu_online_map);
    idle_loop();
}
