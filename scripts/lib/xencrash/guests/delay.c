/*
 * delay.c - waiting by the 8254's channel 2, whose output can be polled. The time during which a debugger has
 * stopped the machine does not count: QEMU's 8254 stands still then.
 */
#include "xen.h"

/* Intel 8254 datasheet, "Control Word Format"; port 0x61 is that of the PC/AT. */
#define PIT_HZ          1193182
#define PIT_CHANNEL_2   0x42
#define PIT_CONTROL     0x43
#define PIT_ONE_SHOT_2  0xb0                    /* channel 2, low byte then high byte, mode 0, binary */
#define PORT_B          0x61
#define PORT_B_GATE_2   0x01
#define PORT_B_SPEAKER  0x02
#define PORT_B_OUT_2    0x20

void mdelay(unsigned int milliseconds)
{
    const unsigned int ticks = PIT_HZ / 1000;

    while ( milliseconds-- )
    {
        outb(PORT_B, (inb(PORT_B) & ~PORT_B_SPEAKER) | PORT_B_GATE_2);
        outb(PIT_CONTROL, PIT_ONE_SHOT_2);
        outb(PIT_CHANNEL_2, ticks & 0xff);
        outb(PIT_CHANNEL_2, ticks >> 8);
        while ( !(inb(PORT_B) & PORT_B_OUT_2) )
            cpu_relax();
    }
}
