/*
 * lib.c - memory, strings and CPU masks.
 */
#include "xen.h"

unsigned long xen_phys_start = XEN_PHYS_START;

/* The heap begins behind the image, and only grows. */
void *alloc_xenheap(size_t size)
{
    extern char _end[];
    static unsigned long next;
    unsigned long alignment = 16;

    if ( !next )
        next = image_pa(_end);
    while ( alignment < size )
        alignment *= 2;
    next = (next + alignment - 1) & -alignment;
    if ( next + size > CRASH_IMAGE_START )
        panic("out of memory");
    next += size;
    return memset(__va(next - size), 0, size);
}

void *memcpy(void *to, const void *from, size_t size)
{
    void *at = to;

    asm volatile ( "rep movsb" : "+D" (at), "+S" (from), "+c" (size) :: "memory" );
    return to;
}

void *memset(void *to, int byte, size_t size)
{
    void *at = to;

    asm volatile ( "rep stosb" : "+D" (at), "+c" (size) : "a" (byte) : "memory" );
    return to;
}

bool streq(const char *a, const char *b)
{
    while ( *a && *a == *b )
        a++, b++;
    return *a == *b;
}

bool cpumask_empty(const cpumask_t *mask)
{
    return cpumask_equal(mask, &(const cpumask_t){});
}

bool cpumask_equal(const cpumask_t *a, const cpumask_t *b)
{
    for ( unsigned int i = 0; i < ARRAY_SIZE(a->bits); i++ )
        if ( *(volatile const uint64_t *)&a->bits[i] != *(volatile const uint64_t *)&b->bits[i] )
            return false;
    return true;
}

unsigned int cpumask_weight(const cpumask_t *mask)
{
    unsigned int cpu, weight = 0;

    for_each_cpu ( cpu, mask )
        weight++;
    return weight;
}
