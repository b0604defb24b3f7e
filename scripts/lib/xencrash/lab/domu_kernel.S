/*
 * What every vCPU of the lab's domU runs: 32-bit code that turns paging on and spins, so that its CR3, its segments and
 * its RIP are nothing like Xen's. Once in a while it counts, and executes CPUID, which Xen intercepts.
 *
 * It may be copied anywhere into the first 4 MiB, which it maps one to one. %ebx: a page for its page directory; %esi:
 * a word of this vCPU's own, for its count.
 */
        .section .rodata
        .globl  domu_kernel, domu_kernel_end
        .code32
domu_kernel:
        movl    $0x83, (%ebx)           /* 4 MiB from 0: present, writable, large */
        movl    %cr4, %eax
        orl     $0x10, %eax             /* PSE */
        movl    %eax, %cr4
        movl    %ebx, %cr3
        movl    %cr0, %eax
        orl     $0x80000000, %eax       /* PG */
        movl    %eax, %cr0
1:      incl    (%esi)
        movl    $10000000, %edi
2:      decl    %edi
        jnz     2b
        xorl    %eax, %eax
        cpuid
        jmp     1b
domu_kernel_end:

        .section .note.GNU-stack, "", @progbits
