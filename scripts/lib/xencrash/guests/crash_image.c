/*
 * crash_image.c - the crash kernel's part, as small as it can be: is the machine fit to be used?
 *
 * It runs on the crashing CPU, in long mode, where it was loaded, and brings its own GDT, IDT and stack. It
 * says on the debug console (port 0xe9) and on the serial port that it is alive and in which mode it finds
 * the local APIC, then sends itself an NMI: if that arrives, NMIs are unblocked.
 *
 * What it and Xen agree on is in layout.h. Its first word is the jump to its code.
 */
#include "layout.h"
#include "machine.h"

#define DEBUG_PORT      0xe9                    /* QEMU: -device isa-debugcon */
#define EXIT_PORT       0xf4                    /* QEMU: -device isa-debug-exit,iobase=0xf4; status 2 * value + 1 */
#define EXIT_OPEN       0x10
#define EXIT_SHUT       0x11

/* Where the local APIC lies after reset: SDM vol. 3, "Local APIC Register Address Map". */
#define LOCAL_APIC      ((volatile uint32_t *)0xfee00000)

/* Its own selectors. */
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

static void say(const char *text)
{
    for ( ; *text; text++ )
    {
        outb(DEBUG_PORT, *text);
        serial_putc(*text);
    }
}

static const uint64_t gdt[] = { 0, [CODE / 8] = SEGMENT_CODE64, [DATA / 8] = SEGMENT_DATA };
static idt_entry_t idt[FIRST_IRQ_VECTOR];

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
    idt[vector] = (idt_entry_t){ gate_lower(CODE, INTERRUPT_GATE, 0, handler), (uint64_t)handler >> 32 };
}

static void own_tables(void)
{
    struct table_register gdtr = { sizeof(gdt) - 1, (uint64_t)gdt };
    struct table_register idtr = { sizeof(idt) - 1, (uint64_t)idt };

    for ( unsigned int vector = 0; vector < FIRST_IRQ_VECTOR; vector++ )
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
        wrmsr(MSR_X2APIC(APIC_ICR), rdmsr(MSR_X2APIC(APIC_ID)) << 32 | ICR_NMI);
    else if ( mode & APIC_BASE_EN )
    {
        LOCAL_APIC[APIC_ICR2 / 4] = LOCAL_APIC[APIC_ID / 4];
        LOCAL_APIC[APIC_ICR / 4] = ICR_NMI;
    }
}

__attribute__((used)) static void main(uint32_t flags)
{
    uint64_t mode = rdmsr(MSR_APIC_BASE);

    own_tables();
    runs = 1;
    say("crash image: alive, local APIC ");
    say(mode & APIC_BASE_EXTD ? "in x2APIC mode\r\n" : mode & APIC_BASE_EN ? "in xAPIC mode\r\n" : "disabled\r\n");

    send_self_nmi(mode);
    for ( unsigned int i = 0; i < 1000 && !nmis; i++ )
        inb(UART_LSR);                          /* takes its time */
    say(nmis ? "crash image: NMIs are unblocked\r\n" : "crash image: NMIs are blocked\r\n");

    if ( flags & CRASH_IMAGE_EXITS )
        outb(EXIT_PORT, nmis ? EXIT_OPEN : EXIT_SHUT);
    halt_for_good();
}
