/*
 * acpi.c - the CPUs that the firmware announces: ACPI 6.5, 5.2.5 (RSDP), 5.2.7 (RSDT), 5.2.12 (MADT).
 *
 * Enabled entries are CPUs to bring up. Disabled ones could be plugged in later: they count in nr_cpu_ids,
 * and stay absent.
 */
#include "xen.h"

struct rsdp { char signature[8]; uint8_t checksum; char oem[6]; uint8_t revision; uint32_t rsdt; }
    __attribute__((packed));
struct sdt { char signature[4]; uint32_t length; uint8_t rest[28]; } __attribute__((packed));
struct madt { struct sdt header; uint32_t local_apic, flags; uint8_t entries[]; } __attribute__((packed));
struct madt_lapic { uint8_t type, length, acpi_id, apic_id; uint32_t flags; } __attribute__((packed));

#define MADT_LAPIC      0                       /* ACPI 6.5, 5.2.12.2, "Processor Local APIC Structure" */
#define LAPIC_ENABLED   1

static bool signed_as(const void *at, const char *signature)
{
    for ( const char *p = at; *signature; p++, signature++ )
        if ( *p != *signature )
            return false;
    return true;
}

/* In the BIOS's read-only memory: ACPI 6.5, 5.2.5.1. */
static const struct madt *find_madt(void)
{
    for ( unsigned long at = 0xe0000; at < 0x100000; at += 16 )
    {
        const struct rsdp *rsdp = __va(at);
        const struct sdt *rsdt;
        const uint32_t *tables;

        if ( !signed_as(rsdp, "RSD PTR ") )
            continue;
        rsdt = __va(rsdp->rsdt);
        tables = (const uint32_t *)(rsdt + 1);
        for ( ; (const char *)tables < (const char *)rsdt + rsdt->length; tables++ )
            if ( signed_as(__va(*tables), "APIC") )
                return __va(*tables);
    }
    panic("the firmware has no MADT");
}

static unsigned int add_cpu(uint32_t apic_id)
{
    if ( nr_cpu_ids == NR_CPUS )
        panic("more than %u CPUs", NR_CPUS);
    x86_cpu_to_apicid[nr_cpu_ids] = apic_id;
    return nr_cpu_ids++;
}

void find_cpus(void)
{
    const struct madt *madt = find_madt();
    const uint8_t *end = (const uint8_t *)madt + madt->header.length;

    for ( const uint8_t *at = madt->entries; at < end; at += at[1] )
    {
        const struct madt_lapic *lapic = (const void *)at;

        if ( lapic->type != MADT_LAPIC )
            continue;
        if ( lapic->flags & LAPIC_ENABLED )
            cpumask_set_cpu(add_cpu(lapic->apic_id), &cpu_present_map);
        else
            add_cpu(BAD_APICID);
    }
    while ( nr_cpu_ids < options.nr_cpu_ids )
        add_cpu(BAD_APICID);
    for ( unsigned int cpu = nr_cpu_ids; cpu < NR_CPUS; cpu++ )
        x86_cpu_to_apicid[cpu] = BAD_APICID;
}
