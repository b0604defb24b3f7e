/*
 * machine.h - the PC as Xen and the crash image both find it: instructions that C has no words for, descriptors,
 * the local APIC, the first serial port.
 *
 * SDM: Intel's Software Developer's Manual; the titles quoted are those of its sections and tables. Where Xen has
 * its own name for a register, that is used.
 */
#ifndef MACHINE_H
#define MACHINE_H

#include <stdint.h>

/* -- Instructions: SDM vol. 2 ----------------------------------------------------------------------- */

static inline void local_irq_disable(void) { asm volatile ( "cli" ::: "memory" ); }
static inline void local_irq_enable(void)  { asm volatile ( "sti" ::: "memory" ); }
static inline void halt(void)              { asm volatile ( "hlt" ::: "memory" ); }
/* No interrupt is taken between STI and the instruction behind it: the one that ends the HLT is not lost. */
static inline void safe_halt(void)         { asm volatile ( "sti; hlt" ::: "memory" ); }
static inline void cpu_relax(void)         { asm volatile ( "pause" ::: "memory" ); }
static inline void barrier(void)           { asm volatile ( "" ::: "memory" ); }

static inline void outb(uint16_t port, uint8_t value)
{
    asm volatile ( "outb %0, %1" :: "a" (value), "Nd" (port) );
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;

    asm volatile ( "inb %1, %0" : "=a" (value) : "Nd" (port) );
    return value;
}

static inline uint64_t rdmsr(uint32_t msr)
{
    uint32_t low, high;

    asm volatile ( "rdmsr" : "=a" (low), "=d" (high) : "c" (msr) );
    return low | (uint64_t)high << 32;
}

static inline void wrmsr(uint32_t msr, uint64_t value)
{
    asm volatile ( "wrmsr" :: "c" (msr), "a" ((uint32_t)value), "d" ((uint32_t)(value >> 32)) : "memory" );
}

static inline uint32_t cpuid_ecx(uint32_t leaf)
{
    uint32_t eax = leaf, ecx = 0, ebx, edx;

    asm volatile ( "cpuid" : "+a" (eax), "+c" (ecx), "=b" (ebx), "=d" (edx) );
    return ecx;
}

#define read_cr(n) ({ unsigned long cr_; asm volatile ( "mov %%cr" #n ", %0" : "=r" (cr_) ); cr_; })

/* -- Model-specific registers: SDM vol. 4, "Architectural MSRs" ------------------------------------- */

#define MSR_APIC_BASE       0x0000001b          /* IA32_APIC_BASE; SDM vol. 3, "x2APIC State Transitions" */
#define APIC_BASE_EXTD      (1UL << 10)
#define APIC_BASE_EN        (1UL << 11)
#define MSR_FS_BASE         0xc0000100
#define MSR_GS_BASE         0xc0000101

/* -- Descriptors ------------------------------------------------------------------------------------ */

/* The operand of LGDT and LIDT: SDM vol. 3, "Pseudo-Descriptor Formats". */
struct table_register { uint16_t limit; uint64_t base; } __attribute__((packed));

/* SDM vol. 3, "Segment Descriptors": present, DPL 0, accessed. */
#define SEGMENT_CODE64      0x00af9b000000ffffUL /* L: 64-bit code */
#define SEGMENT_DATA        0x00cf93000000ffffUL

/* SDM vol. 3, "64-Bit Mode IDT". */
typedef struct { uint64_t a, b; } idt_entry_t;

#define GATE_SELECTOR_SHIFT 16
#define GATE_IST_SHIFT      32
#define GATE_IST_MASK       (7UL << GATE_IST_SHIFT)
#define GATE_TYPE_SHIFT     40
#define GATE_DPL_SHIFT      45
#define GATE_PRESENT        (1UL << 47)
#define INTERRUPT_GATE      14                  /* SDM vol. 3, "System-Segment and Gate-Descriptor Types" */
#define TRAP_GATE           15

/* The lower half of a present gate, IST off. */
static inline uint64_t gate_lower(uint64_t selector, uint64_t type, uint64_t dpl, void (*handler)(void))
{
    uint64_t offset = (uint64_t)handler;

    return (offset & 0xffff) | selector << GATE_SELECTOR_SHIFT | type << GATE_TYPE_SHIFT |
           dpl << GATE_DPL_SHIFT | GATE_PRESENT | (offset & 0xffff0000) << 32;
}

/* -- Local APIC: SDM vol. 3, "Local APIC Register Address Map" -------------------------------------- */

/* Offsets in xAPIC mode; in x2APIC mode the register is an MSR ("x2APIC Register Address Space"). */
#define MSR_X2APIC(reg)     (0x800 + (reg) / 16)
#define APIC_ID             0x020
#define APIC_ICR            0x300
#define APIC_ICR2           0x310

/* SDM vol. 3, "Interrupt Command Register (ICR)". */
#define ICR_NMI             0x400
#define ICR_INIT            0x500
#define ICR_STARTUP         0x600
#define ICR_BUSY            (1U << 12)          /* delivery status */
#define ICR_ASSERT          (1U << 14)          /* level */

/* -- Serial port: National Semiconductor PC16550D datasheet, "Registers" ---------------------------- */

#define COM1                0x3f8
#define UART_DATA           (COM1 + 0)
#define UART_LSR            (COM1 + 5)
#define LSR_RECEIVED        0x01
#define LSR_CAN_SEND        0x20

static inline void serial_putc(char c)
{
    while ( !(inb(UART_LSR) & LSR_CAN_SEND) )
        cpu_relax();
    outb(UART_DATA, c);
}

#endif /* MACHINE_H */
