/*
 * kexec_reloc.S - out of Xen's addresses and into the crash image.
 *
 * void kexec_reloc(unsigned long image, unsigned long page_table, unsigned long flags)
 *
 * Both addresses are physical. The page table maps this code where it is, and the image to itself. From the
 * new CR3 on nothing of Xen's is used: not its stack, and the image brings its own descriptor tables.
 *
 * Xen has this function since 4.4; before, the jump was made by code that came with the image.
 */
        .text
        .globl  kexec_reloc
        .type   kexec_reloc, @function
        .balign 16
kexec_reloc:
        cli
        mov     %rsi, %cr3
        xor     %esp, %esp
        mov     %rdi, %rax
        mov     %edx, %edi
        jmp     *%rax
        .size   kexec_reloc, . - kexec_reloc

        .section .note.GNU-stack, "", @progbits
