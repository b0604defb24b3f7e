/*
 * head.S - from QEMU's multiboot loader, or from a SIPI, to C in Xen's addresses.
 *
 * The boot CPU arrives at start in 32-bit protected mode, the image in place. The others arrive at
 * AP_START_PAGE in real mode, at a copy of the first lines of ap_start. Both go on in to_long_mode, with
 * boot_pg_table, and end in C with idle_pg_table, on which every CPU runs from then on.
 */
#include "layout.h"

/* A symbol's physical address; fits 32 bits. */
#define PHYS(symbol)    ((symbol) - (XEN_VIRT_START - XEN_PHYS_START))

/* Multiboot Specification 0.6.96, 3.1. */
#define MULTIBOOT_MAGIC     0x1badb002
#define MULTIBOOT_ADDRESSES (1 << 16)           /* a flat image: addresses are given here, not in ELF headers */

/* SDM vol. 3, "Control Registers" and "Extended Feature Enable Register". */
#define CR0_PE          0x00000001
#define CR0_WP          0x00010000
#define CR0_PG          0x80000000
#define CR4_PAE         0x00000020
#define CR4_MCE         0x00000040              /* else a machine check ends the machine, whatever its gate says */
#define MSR_EFER        0xc0000080
#define EFER_LME        0x00000100

#define BOOT_CS32       0x08
#define BOOT_DS         0x10
#define BOOT_CS64       0x18

        .section .text.head, "ax", @progbits
        .globl  _start, start
_start:
        .balign 4
        .long   MULTIBOOT_MAGIC, MULTIBOOT_ADDRESSES, -(MULTIBOOT_MAGIC + MULTIBOOT_ADDRESSES)
        .long   PHYS(_start)                    /* where this header, */
        .long   PHYS(_start)                    /* the image, */
        .long   PHYS(__load_end)                /* its end in the file, */
        .long   PHYS(_end)                      /* the end of its .bss, */
        .long   PHYS(start)                     /* and its entry point are */

        .code32
start:
        cli
        cld
        mov     %ebx, %esi                      /* the multiboot information: to __start_xen() */
        mov     $PHYS(__bss_start), %edi
        mov     $PHYS(_end), %ecx
        sub     %edi, %ecx
        xor     %eax, %eax
        rep stosb
        lgdt    PHYS(boot_gdtr)
        xor     %edi, %edi                      /* 0: the boot CPU */

to_long_mode:
        mov     $(CR4_PAE | CR4_MCE), %eax
        mov     %eax, %cr4
        mov     $PHYS(boot_pg_table), %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $EFER_LME, %eax
        wrmsr
        mov     %cr0, %eax
        or      $(CR0_PG | CR0_WP | CR0_PE), %eax
        mov     %eax, %cr0
        ljmp    $BOOT_CS64, $PHYS(in_long_mode)

ap_protected:
        mov     $BOOT_DS, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $1, %edi                        /* 1: another CPU */
        jmp     to_long_mode

        .code64
in_long_mode:
        movabs  $at_xens_addresses, %rax
        jmp     *%rax
at_xens_addresses:
        mov     $PHYS(idle_pg_table), %eax
        mov     %rax, %cr3
        xor     %eax, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %fs
        mov     %eax, %gs
        mov     %eax, %ss
        test    %edi, %edi
        jnz     1f
        lea     cpu0_stack + STACK_SIZE - CPU_INFO_SIZE(%rip), %rsp
        mov     %esi, %edi
        call    __start_xen
1:      mov     stack_start(%rip), %rsp
        call    start_secondary
        ud2

        /* smpboot.c copies this to AP_START_PAGE. A SIPI starts it with CS there and IP 0. */
        .globl  ap_start, ap_start_end
        .code16
ap_start:
        cli
        mov     %cs, %ax
        mov     %ax, %ds
        lgdtl   boot_gdtr - ap_start
        mov     %cr0, %eax
        or      $CR0_PE, %al
        mov     %eax, %cr0
        ljmpl   $BOOT_CS32, $PHYS(ap_protected)
boot_gdtr:
        .word   boot_gdt_end - boot_gdt - 1
        .long   PHYS(boot_gdt)
ap_start_end:
        .code64

        .balign 8
boot_gdt:
        .quad   0
        .quad   0x00cf9a000000ffff              /* BOOT_CS32: 4 GiB of 32-bit code */
        .quad   0x00cf92000000ffff              /* BOOT_DS: 4 GiB of data */
        .quad   0x00af9a000000ffff              /* BOOT_CS64 */
boot_gdt_end:

/*
 * Page tables: SDM vol. 3, "4-Level Paging". Large pages throughout, so all of them are constants.
 */
#define TABLE           0x063                   /* present, writable, accessed, dirty */
#define PAGE_2M         0x0e3                   /* and a page of 2 MiB */
#define DEVICE_2M       0x0fb                   /* and not cached (PCD, PWT) */
#define L4_SLOT(va)     (((va) >> 39) & 511)
#define L3_SLOT(va)     (((va) >> 30) & 511)
#define L2_SLOT(pa)     (((pa) >> 21) & 511)
#define IO_APIC         0xfec00000
#define LOCAL_APIC      0xfee00000              /* one slot further */

        .section .data.page_tables, "aw", @progbits
        .globl  idle_pg_table, boot_pg_table
        .balign PAGE_SIZE
idle_pg_table:
        .fill   L4_SLOT(XEN_VIRT_START), 8, 0
        .quad   PHYS(l3_xen) + TABLE
        .quad   PHYS(l3_directmap) + TABLE      /* DIRECTMAP_START's slot is the next one */
        .fill   512 - L4_SLOT(DIRECTMAP_START) - 1, 8, 0
boot_pg_table:
        .quad   PHYS(l3_identity) + TABLE
        .fill   L4_SLOT(XEN_VIRT_START) - 1, 8, 0
        .quad   PHYS(l3_xen) + TABLE
        .quad   PHYS(l3_directmap) + TABLE
        .fill   512 - L4_SLOT(DIRECTMAP_START) - 1, 8, 0
l3_identity:
        .quad   PHYS(l2_memory) + TABLE, 0, 0, PHYS(l2_devices) + TABLE
        .fill   512 - 4, 8, 0
l3_directmap:
        .quad   PHYS(l2_memory) + TABLE, PHYS(l2_memory) + PAGE_SIZE + TABLE
        .fill   512 - 2, 8, 0
l3_xen:
        .fill   L3_SLOT(FIXMAP_GIGABYTE), 8, 0
        .quad   PHYS(l2_devices) + TABLE
        .fill   L3_SLOT(XEN_VIRT_START) - L3_SLOT(FIXMAP_GIGABYTE) - 1, 8, 0
        .quad   PHYS(l2_xen) + TABLE
        .fill   512 - L3_SLOT(XEN_VIRT_START) - 1, 8, 0
l2_xen:
        .set    .Lat, XEN_PHYS_START
        .rept   8
        .quad   .Lat + PAGE_2M
        .set    .Lat, .Lat + (2 << 20)
        .endr
        .fill   512 - 8, 8, 0
l2_memory:                                      /* two tables */
        .set    .Lat, 0
        .rept   2 * 512
        .quad   .Lat + PAGE_2M
        .set    .Lat, .Lat + (2 << 20)
        .endr
l2_devices:
        .fill   L2_SLOT(IO_APIC), 8, 0
        .quad   IO_APIC + DEVICE_2M, LOCAL_APIC + DEVICE_2M
        .fill   512 - L2_SLOT(IO_APIC) - 2, 8, 0

        .section .note.GNU-stack, "", @progbits
