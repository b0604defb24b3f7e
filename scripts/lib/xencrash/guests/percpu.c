/*
 * percpu.c - the per-CPU areas: where each CPU's copy of the template is, if it has one.
 */
#include "xen.h"

unsigned long __per_cpu_offset[NR_CPUS];
void *idle_vcpu[NR_CPUS];

void percpu_init_areas(void)
{
    for ( unsigned int cpu = 1; cpu < NR_CPUS; cpu++ )
        __per_cpu_offset[cpu] = INVALID_PERCPU_AREA;
}

unsigned long percpu_alloc_area(unsigned int cpu)
{
    char *area = alloc_xenheap(__per_cpu_data_end - __per_cpu_start);

    return __per_cpu_offset[cpu] = area - __per_cpu_start;
}

/* There is nothing to a vCPU here but its address. */
static char vcpus[NR_CPUS];

void init_cpu_info(unsigned int cpu, void *stack)
{
    struct cpu_info *info = (struct cpu_info *)((char *)stack + STACK_SIZE) - 1;

    info->processor_id = cpu;
    info->current_vcpu = idle_vcpu[cpu] = &vcpus[cpu];
    info->per_cpu_offset = __per_cpu_offset[cpu];
}
