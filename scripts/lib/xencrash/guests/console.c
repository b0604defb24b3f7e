/*
 * console.c - what the guest says goes to the first serial port and into Xen's console ring; 'C' typed there
 * is the key with which Xen crashes on purpose.
 */
#include "xen.h"

/* National Semiconductor PC16550D datasheet, "Registers": those beside machine.h's. */
#define UART_DLL        (COM1 + 0)              /* while DLAB is set */
#define UART_DLM        (COM1 + 1)
#define UART_IER        (COM1 + 1)
#define UART_FCR        (COM1 + 2)
#define UART_LCR        (COM1 + 3)
#define UART_MCR        (COM1 + 4)
#define IER_RECEIVED    0x01
#define FCR_ENABLE      0x07                    /* both FIFOs on, and empty */
#define LCR_8N1         0x03
#define LCR_DLAB        0x80
#define MCR_OUT2        0x0b                    /* DTR, RTS, and OUT2: on a PC it lets the interrupt through */

#define CONRING_SIZE    16384

/* Free-running indices: byte i is at conring[i & (conring_size - 1)]. */
static char _conring[CONRING_SIZE];
static char *conring;
static uint32_t conring_size, conringc, conringp;

void console_init(void)
{
    /* In the directmap, as Xen's ring is when it has left the one that it boots with. */
    conring = __va(image_pa(_conring));
    conring_size = CONRING_SIZE;

    outb(UART_LCR, LCR_DLAB);
    outb(UART_DLL, 1);                          /* 115200 baud */
    outb(UART_DLM, 0);
    outb(UART_LCR, LCR_8N1);
    outb(UART_FCR, FCR_ENABLE);
    outb(UART_MCR, MCR_OUT2);
    outb(UART_IER, 0);
}

/* Takes what was typed. Afterwards the port interrupts when there is more. */
void console_listen(void)
{
    outb(UART_IER, IER_RECEIVED);
    while ( inb(UART_LSR) & LSR_RECEIVED )
        if ( inb(UART_DATA) == 'C' )
        {
            printk("'C' pressed -> triggering crashdump\n");
            start_crash();
        }
}

static void putc(char c)
{
    conring[conringp++ & (conring_size - 1)] = c;
    if ( conringp - conringc > conring_size )
        conringc = conringp - conring_size;
    if ( c == '\n' )
        serial_putc('\r');
    serial_putc(c);
}

static void put_number(unsigned long value, unsigned int base)
{
    if ( value >= base )
        put_number(value / base, base);
    putc("0123456789abcdef"[value % base]);
}

/* %s, %u, %x, and %lx. */
static void vprintk(const char *format, va_list args)
{
    for ( ; *format; format++ )
    {
        if ( *format != '%' )
        {
            putc(*format);
            continue;
        }
        switch ( *++format )
        {
        case 's':
            for ( const char *s = va_arg(args, const char *); *s; s++ )
                putc(*s);
            break;
        case 'u':
            put_number(va_arg(args, unsigned int), 10);
            break;
        case 'x':
            put_number(va_arg(args, unsigned int), 16);
            break;
        case 'l':
            format++;
            put_number(va_arg(args, unsigned long), 16);
            break;
        }
    }
}

void printk(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vprintk(format, args);
    va_end(args);
}

/* A panic is a crash, too; where that has begun already, the end. */
void panic(const char *format, ...)
{
    va_list args;

    local_irq_disable();
    printk("\nPanic on CPU %u:\n", smp_processor_id());
    va_start(args, format);
    vprintk(format, args);
    va_end(args);
    printk("\n");
    kexec_crash();
    for ( ; ; )
        halt();
}
