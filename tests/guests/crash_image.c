/*
 * crash_image.c - the crash kernel's part, as small as it can be: is the machine fit to be used?
 *
 * It runs on the crashing CPU, in long mode, where it was loaded, and brings its own GDT, IDT and stack. It
 * says on the debug console (port 0xe9) and on the serial port that it is alive and in which mode it finds
 * the local APIC, then sends itself an NMI: if that arrives, NMIs are open.
 *
 * Its first word is the jump to its code, the second becomes 1 when it runs.
 */
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

#define DEBUG_PORT      0xe9                    /* QEMU: -device isa-debugcon */
#define EXIT_PORT       0xf4                    /* QEMU: -device isa-debug-exit,iobase=0xf4; status 2 * value + 1 */
#define EXIT_OPEN       0x10
#define EXIT_SHUT       0x11
#define COM1            0x3f8
#define COM1_LSR        (COM1 + 5)
#define LSR_CAN_SEND    0x20

/* SDM vol. 3, "IA32_APIC_BASE MSR" and "Local APIC Register Address Map". */
#define MSR_APIC_BASE   0x01b
#define APIC_BASE_EXTD  (1UL << 10)
#define APIC_BASE_EN    (1UL << 11)
#define MSR_X2APIC_ID   0x802
#define MSR_X2APIC_ICR  0x830
#define LAPIC           ((volatile uint32_t *)0xfee00000)
#define LAPIC_ID        (0x020 / 4)
#define LAPIC_ICR       (0x300 / 4)
#define LAPIC_ICR2      (0x310 / 4)
#define ICR_NMI         0x400

#define CODE            0x08
#define DATA            0x10

asm ( ".pushsection .head, \"awx\"      \n"
      "        jmp     entry            \n"
      "        .balign 8                \n"
      "runs:   .quad   0                \n"
      "entry:  lea     stack_top(%rip), %rsp \n"
      "        call    main             \n"
      "        .popsection              \n"
      ".globl entry, runs               \n" );

extern volatile uint64_t runs;
static char stack[4096] __attribute__((aligned(16), used));
asm ( ".globl stack_top; .set stack_top, stack + 4096" );

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

static void say(const char *text)
{
    for ( ; *text; text++ )
    {
        outb(DEBUG_PORT, *text);
        while ( !(inb(COM1_LSR) & LSR_CAN_SEND) )
            ;
        outb(COM1, *text);
    }
}

/* SDM vol. 3, "Segment Descriptors" and "64-Bit Mode IDT". */
static const uint64_t gdt[] = { 0, 0x00af9b000000ffff, 0x00cf93000000ffff };
static struct { uint64_t a, b; } idt[32];
struct table_register { uint16_t limit; uint64_t base; } __attribute__((packed));

static volatile unsigned int nmis;
void nmi_entry(void);
void failed(void);
asm ( ".globl nmi_entry, failed                 \n"
      "nmi_entry: incl nmis(%rip)               \n"
      "        iretq                            \n"
      "failed: call    on_exception             \n" );

static void halt_for_good(void)
{
    for ( ; ; )
        asm volatile ( "cli; hlt" );
}

__attribute__((used)) static void on_exception(void)
{
    say("crash image: an exception\r\n");
    halt_for_good();
}

static void set_gate(unsigned int vector, void (*handler)(void))
{
    uint64_t offset = (uint64_t)handler;

    idt[vector].a = (offset & 0xffff) | (uint64_t)CODE << 16 | 0x8eUL << 40 | (offset & 0xffff0000) << 32;
    idt[vector].b = offset >> 32;
}

static void own_tables(void)
{
    struct table_register gdtr = { sizeof(gdt) - 1, (uint64_t)gdt };
    struct table_register idtr = { sizeof(idt) - 1, (uint64_t)idt };

    for ( unsigned int vector = 0; vector < 32; vector++ )
        set_gate(vector, failed);
    set_gate(VECTOR_NMI, nmi_entry);
    asm volatile ( "lgdt %0                 \n\t"
                   "mov  %3, %%ss           \n\t"
                   "pushq %2                \n\t"
                   "lea  1f(%%rip), %%rax   \n\t"
                   "push %%rax              \n\t"
                   "lretq                   \n\t"
                   "1:                      \n\t"
                   "lidt %1"
                   :: "m" (gdtr), "m" (idtr), "i" (CODE), "r" (DATA) : "rax", "memory" );
}

static void send_self_nmi(uint64_t mode)
{
    if ( mode & APIC_BASE_EXTD )
        wrmsr(MSR_X2APIC_ICR, rdmsr(MSR_X2APIC_ID) << 32 | ICR_NMI);
    else if ( mode & APIC_BASE_EN )
    {
        LAPIC[LAPIC_ICR2] = LAPIC[LAPIC_ID];
        LAPIC[LAPIC_ICR] = ICR_NMI;
    }
}

__attribute__((used)) static void main(unsigned int exits)
{
    uint64_t mode = rdmsr(MSR_APIC_BASE);

    own_tables();
    runs = 1;
    say("crash image: alive, local APIC ");
    say(mode & APIC_BASE_EXTD ? "in x2APIC mode\r\n" : mode & APIC_BASE_EN ? "in xAPIC mode\r\n" : "disabled\r\n");

    send_self_nmi(mode);
    for ( unsigned int i = 0; i < 1000 && !nmis; i++ )
        inb(COM1_LSR);                          /* takes its time */
    say(nmis ? "crash image: NMIs are open\r\n" : "crash image: NMIs are shut\r\n");

    if ( exits )
        outb(EXIT_PORT, nmis ? EXIT_OPEN : EXIT_SHUT);
    halt_for_good();
}
