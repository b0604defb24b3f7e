/*
 * apic.c - the local APIC in both modes, its end on the crash path, and the I/O APIC.
 *
 * SDM vol. 3, chapter "Advanced Programmable Interrupt Controller (APIC)"; the registers' names are those of
 * its tables "Local APIC Register Address Map" and "Local APIC Register Address Map Supported by x2APIC".
 */
#include "xen.h"
#include "fault.h"

#define CPUID_1_ECX_X2APIC  (1U << 21)          /* SDM vol. 2, CPUID, "Feature Information Returned in ECX" */

/* Registers beside those that machine.h has. */
#define APIC_TPR            0x080
#define APIC_EOI            0x0b0
#define APIC_LDR            0x0d0
#define APIC_DFR            0x0e0
#define APIC_SPIV           0x0f0
#define APIC_ESR            0x280
#define APIC_LVTT           0x320
#define APIC_LVTTHMR        0x330
#define APIC_LVTPC          0x340
#define APIC_LVT0           0x350
#define APIC_LVT1           0x360
#define APIC_LVTERR         0x370
#define APIC_TMICT          0x380

/* SDM vol. 3, "Spurious-Interrupt Vector Register" and "Local Vector Table". */
#define SPIV_ENABLED        (1U << 8)
#define LVT_MASKED          (1U << 16)
#define LVT_NMI             (4U << 8)
#define LVT_EXTINT          (7U << 8)
/* Remote IRR and delivery status: read-only on hardware, kept by QEMU. Xen writes them. */
#define LVT_STATUS          (1U << 14 | 1U << 12)
#define ERROR_VECTOR        0xfe

#define LOCAL_APIC          ((volatile uint32_t *)(FIXMAP_GIGABYTE + 0x3ee00000))
#define IO_APIC             ((volatile uint32_t *)(FIXMAP_GIGABYTE + 0x3ec00000))

bool x2apic_enabled;
static enum apic_mode apic_boot_mode = APIC_MODE_INVALID;

static uint32_t apic_read(unsigned int reg)
{
    return x2apic_enabled ? (uint32_t)rdmsr(MSR_X2APIC(reg)) : LOCAL_APIC[reg / 4];
}

static void apic_write(unsigned int reg, uint32_t value)
{
    if ( x2apic_enabled )
        wrmsr(MSR_X2APIC(reg), value);
    else
        LOCAL_APIC[reg / 4] = value;
}

/* -- Mode ------------------------------------------------------------------------------------------- */

bool has_x2apic(void)
{
    return cpuid_ecx(1) & CPUID_1_ECX_X2APIC;
}

noinline enum apic_mode current_local_apic_mode(void)
{
    uint64_t base = rdmsr(MSR_APIC_BASE);

    if ( has_x2apic() && (base & APIC_BASE_EXTD) )
        return APIC_MODE_X2APIC;
    return base & APIC_BASE_EN ? APIC_MODE_XAPIC : APIC_MODE_DISABLED;
}

void record_boot_APIC_mode(void)
{
    apic_boot_mode = current_local_apic_mode();
}

/* On the CPU that calls: from xAPIC, the only mode from which x2APIC can be entered. */
void enable_x2apic(void)
{
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | APIC_BASE_EN | APIC_BASE_EXTD);
}

static void set_apic_mode(enum apic_mode mode)
{
    uint64_t base = rdmsr(MSR_APIC_BASE) & ~(APIC_BASE_EN | APIC_BASE_EXTD);

    if ( mode != APIC_MODE_DISABLED )
        base |= APIC_BASE_EN;
    if ( mode == APIC_MODE_X2APIC )
        base |= APIC_BASE_EXTD;
    wrmsr(MSR_APIC_BASE, base);
}

/*
 * Back to the mode that the firmware left, in which the crash image expects the LAPIC. From x2APIC the way
 * leads through disabled, and to x2APIC through xAPIC. The earlier generations disable and enable whatever
 * the mode is, and go from disabled to x2APIC at once, which is #GP.
 *
 * One detour of theirs is left out: from xAPIC to xAPIC on a processor that knows nothing else. It ends where
 * it began, and QEMU 7.2, whose processors are like that, does not enable a LAPIC a second time.
 */
static void revert_apic_mode(void)
{
    bool detour = ALWAYS_REVERTS_LAPIC && has_x2apic();

    if ( !detour && current_local_apic_mode() == apic_boot_mode )
        return;
    set_apic_mode(APIC_MODE_DISABLED);
    if ( !ALWAYS_REVERTS_LAPIC && apic_boot_mode == APIC_MODE_X2APIC )
        set_apic_mode(APIC_MODE_XAPIC);
    set_apic_mode(apic_boot_mode);
}

/* -- Up and down ------------------------------------------------------------------------------------ */

uint32_t get_apic_id(void)
{
    return x2apic_enabled ? apic_read(APIC_ID) : apic_read(APIC_ID) >> 24;
}

void setup_local_APIC(void)
{
    if ( !x2apic_enabled )
    {
        apic_write(APIC_DFR, 0xffffffff);       /* flat model; written before the software enable */
        apic_write(APIC_LDR, 1U << (24 + smp_processor_id() % 8));
    }
    apic_write(APIC_TPR, 0);
    apic_write(APIC_SPIV, SPIV_ENABLED | SPURIOUS_VECTOR);
    apic_write(APIC_LVT0, LVT_MASKED | LVT_EXTINT);
    apic_write(APIC_LVT1, LVT_NMI | (smp_processor_id() ? LVT_MASKED : 0));
    apic_write(APIC_LVTERR, ERROR_VECTOR);
}

void ack_APIC_irq(void)
{
    apic_write(APIC_EOI, 0);
}

static void clear_local_APIC(void)
{
    static const unsigned int lvts[] = { APIC_LVTERR, APIC_LVTT, APIC_LVT0, APIC_LVT1, APIC_LVTPC, APIC_LVTTHMR };

    for ( unsigned int i = 0; i < ARRAY_SIZE(lvts); i++ )
        apic_write(lvts[i], LVT_MASKED);
    apic_write(APIC_TMICT, 0);
    if ( CLEARS_LDR && !x2apic_enabled )
        apic_write(APIC_LDR, 0);
    apic_write(APIC_ESR, 0);
}

noinline void disable_local_APIC(void)
{
    unsigned int cpu = smp_processor_id();

    step ( STOP_LAPIC, cpu )
    {
        step ( MASK_LVTS, cpu )
            clear_local_APIC();
        apic_write(APIC_SPIV, apic_read(APIC_SPIV) & ~SPIV_ENABLED);
        if ( kexecing )
            step ( REVERT_LAPIC_MODE, cpu )
                revert_apic_mode();
    }
}

/*
 * Virtual wire mode, in which a kernel that knows nothing of APICs gets the interrupts of the 8259:
 * MultiProcessor Specification 1.4, 3.6.2.2.
 */
void disconnect_bsp_APIC(void)
{
    apic_write(APIC_SPIV, SPIV_ENABLED | 0xf);
    apic_write(APIC_LVT0, LVT_STATUS | LVT_EXTINT);
    apic_write(APIC_LVT1, LVT_STATUS | LVT_NMI);
}

/* -- Interrupt commands ----------------------------------------------------------------------------- */

void send_IPI(uint32_t apic_id, uint32_t icr)
{
    if ( x2apic_enabled )
    {
        wrmsr(MSR_X2APIC(APIC_ICR), (uint64_t)apic_id << 32 | icr);
        return;
    }
    while ( LOCAL_APIC[APIC_ICR / 4] & ICR_BUSY )
        cpu_relax();
    LOCAL_APIC[APIC_ICR2 / 4] = apic_id << 24;
    LOCAL_APIC[APIC_ICR / 4] = icr;
}

/* From a CPU whose LAPIC is stopped: in the mode in which that is now, which x2apic_enabled need not say. */
void send_self_nmi(uint32_t wrong_by)
{
    switch ( current_local_apic_mode() )
    {
    case APIC_MODE_XAPIC:
        while ( LOCAL_APIC[APIC_ICR / 4] & ICR_BUSY )
            cpu_relax();
        LOCAL_APIC[APIC_ICR2 / 4] = LOCAL_APIC[APIC_ID / 4] + (wrong_by << 24);
        LOCAL_APIC[APIC_ICR / 4] = ICR_NMI;
        break;

    case APIC_MODE_X2APIC:
        wrmsr(MSR_X2APIC(APIC_ICR), (rdmsr(MSR_X2APIC(APIC_ID)) + wrong_by) << 32 | ICR_NMI);
        break;

    default:
        break;
    }
}

/* -- I/O APIC: Intel 82093AA datasheet -------------------------------------------------------------- */

#define IOREGSEL            0
#define IOWIN               4
#define IOAPICVER           1
#define IOREDTBL(pin)       (0x10 + 2 * (pin))
#define SERIAL_PIN          4

static void io_apic_write(unsigned int reg, uint32_t value)
{
    IO_APIC[IOREGSEL] = reg;
    IO_APIC[IOWIN] = value;
}

/* To the CPU that shall crash on what is typed there. */
void route_console_irq(uint32_t apic_id)
{
    io_apic_write(IOREDTBL(SERIAL_PIN) + 1, apic_id << 24);
    io_apic_write(IOREDTBL(SERIAL_PIN), CONSOLE_VECTOR);
}

void disable_IO_APIC(void)
{
    unsigned int last;

    IO_APIC[IOREGSEL] = IOAPICVER;
    last = IO_APIC[IOWIN] >> 16 & 0xff;
    for ( unsigned int pin = 0; pin <= last; pin++ )
    {
        io_apic_write(IOREDTBL(pin), LVT_MASKED);
        io_apic_write(IOREDTBL(pin) + 1, 0);
    }
    disconnect_bsp_APIC();
}
