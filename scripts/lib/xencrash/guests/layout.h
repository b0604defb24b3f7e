/*
 * layout.h - where things lie, for C, assembler and linker script.
 *
 * Physical memory:
 *      0x8000  the first instructions of the other CPUs (a SIPI names a page below 1 MiB)
 *   0x1000000  XEN_PHYS_START: the image, START_OFFSET further on, and the heap behind it
 *   0x2000000  CRASH_IMAGE_START: the crash image
 *
 * Virtual memory, through idle_pg_table:
 *   XEN_VIRT_START   the gigabyte of the image; its address there - XEN_VIRT_START + XEN_PHYS_START is physical
 *   FIXMAP_GIGABYTE  the local APIC and the I/O APIC
 *   DIRECTMAP_START  the first two gigabytes of physical memory: all that is below the devices
 * boot_pg_table maps the first and the fourth gigabyte to themselves besides: for the way up into these
 * addresses, and for the crash image, which knows nothing of them.
 */
#ifndef LAYOUT_H
#define LAYOUT_H

#include "generation.h"

#define XEN_PHYS_START     0x1000000
#define AP_START_PAGE      0x8000
#define CRASH_IMAGE_START  0x2000000
#define DIRECTMAP_START    0xffff830000000000
#define PHYSICAL(address)  ((address) - XEN_VIRT_START + XEN_PHYS_START)

#define NR_CPUS            256
#define STACK_SIZE         0x8000               /* 32 KiB, aligned to itself */
#define PAGE_SIZE          0x1000

/*
 * What Xen and the crash image agree on: it is entered at its start, with flags in EDI, and one of its eight-byte
 * words becomes 1 when it runs.
 */
#define CRASH_IMAGE_RUNS   1                    /* the number of that word */
#define CRASH_IMAGE_EXITS  1                    /* flag: the image ends the machine */

/*
 * Selectors. The GDT is loaded so far below its table that the table's first descriptor has Xen's selector
 * 0xe000 (FIRST_RESERVED_GDT_BYTE of public/arch-x86/xen.h): a PV guest owns all lower ones.
 */
#define FIRST_RESERVED_SELECTOR 0xe000
#define HYPERVISOR_CS      0xe008
#define HYPERVISOR_DS      0xe010
#define HYPERVISOR_TSS     0xe040

/* Vectors: SDM vol. 3, "Exception and Interrupt Vectors". */
#define VECTOR_DB          1
#define VECTOR_NMI         2
#define VECTOR_DF          8
#define VECTOR_MC          18
#define FIRST_IRQ_VECTOR   32
#define CONSOLE_VECTOR     0xf0                 /* the serial port's interrupt */
#define VM_EXIT_VECTOR     0xf1                 /* stands for an NMI that is taken as a VM exit */
#define SPURIOUS_VECTOR    0xff

#endif /* LAYOUT_H */
