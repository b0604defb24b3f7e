/*
 * entry.S - where exceptions, NMIs and interrupts enter.
 *
 * The stubs of which the crash path is made differ from generation to generation:
 *
 *   nmi, machine_check   as ever; through exception_table[] while there was one
 *   trap_nop             returns at once: for the crashing CPU, on which nothing may be in the way
 *   nmi_crash            straight to do_nmi_crash: for the others, while their gates were hooked
 *   enable_nmis          an IRET to itself: IRET ends the blocking of NMIs
 *                        (SDM vol. 3, "Handling Multiple NMIs")
 */
#include "layout.h"

#if HAS_ENTRY_NAMES
# define nmi            entry_NMI
# define machine_check  entry_MC
# define double_fault   entry_DF
# define debug          entry_DB
#endif

#if HAS_ENDBR
# define ENDBR          endbr64
#else
# define ENDBR
#endif

#define ENTRY(name)     .globl name; .type name, @function; .balign 16; name: ENDBR
#define END(name)       .size name, . - name

.macro  SAVE_ALL
        cld
        .irp    register, rdi, rsi, rdx, rcx, rax, r8, r9, r10, r11, rbx, rbp, r12, r13, r14, r15
        push    %\register
        .endr
.endm

.macro  RESTORE_ALL
        .irp    register, r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi
        pop     %\register
        .endr
        add     $8, %rsp                        /* error code and vector */
.endm

/* struct cpu_user_regs keeps the vector above the error code, in the same eight bytes. */
.macro  ENTER   vector, error_code=0
        .if     !\error_code
        pushq   $0
        .endif
        movl    $\vector, 4(%rsp)
        SAVE_ALL
        mov     %rsp, %rdi
.endm

.macro  LEAVE
        RESTORE_ALL
        iretq
.endm

/* To exception_table[vector] where there is such a table, else to the handler named. */
.macro  DISPATCH vector, handler
#if HAS_EXCEPTION_TABLE
        call    *exception_table + 8 * \vector(%rip)
#else
        call    \handler
#endif
.endm

        .text

ENTRY(debug)
        ENTER   VECTOR_DB
        DISPATCH VECTOR_DB, do_trap
        LEAVE
END(debug)

ENTRY(nmi)
        ENTER   VECTOR_NMI
        DISPATCH VECTOR_NMI, do_nmi
        LEAVE
END(nmi)

ENTRY(double_fault)
        ENTER   VECTOR_DF, 1
        DISPATCH VECTOR_DF, do_trap
        LEAVE
END(double_fault)

ENTRY(machine_check)
        ENTER   VECTOR_MC
        DISPATCH VECTOR_MC, do_machine_check
        LEAVE
END(machine_check)

#if HOOKS_GATES
ENTRY(nmi_crash)
# if REWRITES_GATES
        cli                                     /* the RFC's; an interrupt gate has done so */
# endif
        ENTER   VECTOR_NMI
        call    do_nmi_crash
        ud2
END(nmi_crash)
#endif

#if REWRITES_GATES

ENTRY(trap_nop)
        iretq
END(trap_nop)

ENTRY(enable_nmis)
        push    %rax
        mov     %rsp, %rax
        pushq   $0                              /* SS: null is fine in ring 0 */
        push    %rax
        pushfq
        pushq   $HYPERVISOR_CS
        lea     1f(%rip), %rax
        push    %rax
        iretq
1:      pop     %rax
        ret
END(enable_nmis)

#elif HAS_ENABLE_NMIS

ENTRY(enable_nmis)
        mov     %rsp, %rax
        pushq   $0                              /* SS: null is fine in ring 0 */
        push    %rax
        pushfq
        pushq   $HYPERVISOR_CS
        lea     1f(%rip), %rax
        push    %rax
        iretq
1:      ret
END(enable_nmis)

        .globl  trap_nop
        .type   trap_nop, @function
trap_nop:
        iretq
END(trap_nop)

#elif HARDENED

ENTRY(trap_nop)
        iretq
END(trap_nop)

#endif

/* The other exceptions: none is expected, each ends in do_trap(). */
        .globl  exception_stubs
        .pushsection .rodata
        .balign 8
exception_stubs:
        .popsection
.altmacro
.macro  STUB    vector
/* SDM vol. 3, table "Protected-Mode Exceptions and Interrupts", column "Error Code". */
        .if     \vector == 8 || \vector == 17 || \vector == 21 || (\vector >= 10 && \vector <= 14)
        .set    .Lerror_code, 1
        .else
        .set    .Lerror_code, 0
        .endif
        .balign 16
exception_\vector:
        ENTER   \vector, .Lerror_code
        DISPATCH \vector, do_trap
        LEAVE
        .pushsection .rodata
        .quad   exception_\vector
        .popsection
.endm
        .set    .Lnumber, 0
        .rept   FIRST_IRQ_VECTOR
        STUB    %.Lnumber
        .set    .Lnumber, .Lnumber + 1
        .endr
.noaltmacro

ENTRY(console_interrupt)
        ENTER   CONSOLE_VECTOR
        call    do_console_irq
        LEAVE
END(console_interrupt)

ENTRY(vm_exit_interrupt)
        ENTER   VM_EXIT_VECTOR
        call    do_vm_exit_nmi
        LEAVE
END(vm_exit_interrupt)

/* No EOI is due: SDM vol. 3, "Spurious Interrupt". */
ENTRY(spurious_interrupt)
        iretq
END(spurious_interrupt)

        .section .note.GNU-stack, "", @progbits
