/*
 * fault.c - which fault was chosen, and what each does at the steps of the crash path.
 */
#include "xen.h"
#include "fault.h"

enum fault fault;
unsigned int fault_cpu;

enum fault fault_by_name(const char *name)
{
    static const struct { enum fault fault; const char *name; } names[] = {
#define F(constant, name) { constant, name },
        FAULTS(F)
#undef F
    };

    for ( unsigned int i = 0; i < ARRAY_SIZE(names); i++ )
        if ( streq(names[i].name, name) )
            return names[i].fault;
    return NO_FAULT;
}

/* -- What is done at a step: true when it is done instead of the step, false when before it ----------- */

static bool leave_out(unsigned int cpu)
{
    return true;
}

/* Bookkeeping. */

static bool sign_off_now(unsigned int cpu)
{
    sign_off(cpu);
    return false;
}

/* The last that a CPU does before it signs off. */
static bool has_stopped(unsigned int cpu)
{
#if HARDENED
    return *(volatile bool *)&per_cpu(crash_save_done, cpu);
#else
    return !cpumask_test_cpu(cpu, &cpu_online_map);
#endif
}

/* A sign-off that comes too early would let the wait end too early, too: but that is a race, and not shown. */
static bool wait_for_its_stop(unsigned int cpu)
{
    for ( unsigned int milliseconds = 1000; !has_stopped(fault_cpu) && milliseconds; milliseconds-- )
        mdelay(1);
    return false;
}

static bool wait_for_all_but_one(unsigned int cpu)
{
    for ( unsigned int milliseconds = 1000; waited_for() > 1 && milliseconds; milliseconds-- )
        mdelay(1);
    return true;
}

static bool be_late(unsigned int cpu)
{
    wait_for_crash_image();
    return false;
}

static noinline noreturn void spin(void)
{
    for ( ; ; )
        barrier();
}

static bool never_halt(unsigned int cpu)
{
    spin();
}

/* Every loop around a HLT (hlt; jmp back to it) becomes hlt; ret; nop. */
static bool return_behind_halt(unsigned int cpu)
{
    extern uint8_t _stext[], _etext[];

    for ( uint8_t *code = _stext; code + 3 <= _etext; code++ )
        if ( code[0] == 0xf4 && code[1] == 0xeb && code[2] == 0xfd )
        {
            code[1] = 0xc3;
            code[2] = 0x90;
        }
    return false;
}

static bool interrupts_on(unsigned int cpu)
{
    local_irq_enable();
    return false;
}

void owner_recorded(int *owner)
{
    if ( fault == OWNER_WRONG )
        *owner = fault_cpu;
}

#if HARDENED

static bool set_save_done(unsigned int cpu)
{
    this_cpu(crash_save_done) = true;
    return false;
}

static bool entered_again;

/* The NMI comes in the spin; what it finds left to do is the sign-off, the self-NMI and the halt. */
static bool enter_again(unsigned int cpu)
{
    entered_again = true;
    enable_nmis();
    send_self_nmi(0);
    spin();
}

static bool sign_off_the_second_time(unsigned int cpu)
{
    if ( entered_again )
        sign_off(cpu);
    return false;
}

static bool misdirect_self_nmi(unsigned int cpu)
{
    send_self_nmi(0x20);
    return true;
}

#endif

/* The NMI and its handler. */

#if HOOKS_GATES
/* As if the two handlers had been mixed up. */
static bool exchange_handlers(unsigned int crashing)
{
    for ( unsigned int cpu = 0; cpu < nr_cpu_ids; cpu++ )
        if ( idt_of(cpu) )
            _update_gate_addr_lower(&idt_of(cpu)[VECTOR_NMI], cpu == crashing ? nmi_crash : trap_nop);
    return false;
}
#endif

#if HOOKS_CALLBACK
/* It found nothing there. */
static bool restore_callback(unsigned int cpu)
{
    set_nmi_callback(NULL);
    return false;
}
#endif

/* The crash may have begun where they are off already, in the console's interrupt. */
static bool leave_interrupts_on(unsigned int cpu)
{
    local_irq_enable();
    return true;
}

static bool run_guest(unsigned int cpu)
{
    static char vcpu;

    get_cpu_info()->current_vcpu = &vcpu;
    return false;
}

static bool send_vm_exit(unsigned int cpu)
{
    send_IPI(x86_cpu_to_apicid[cpu], VM_EXIT_VECTOR);
    return true;
}

/* A self-NMI, in whose handler the shootdown's finds it. */
static bool take_earlier_nmi(unsigned int cpu)
{
    send_IPI(get_apic_id(), ICR_NMI);
    return true;
}

static bool stick(unsigned int cpu)
{
    if ( settle(cpu) )
        for ( ; ; )
            halt();
    return false;
}

static bool stay_late(unsigned int cpu)
{
    if ( settle(cpu) )
        wait_for_crash_image();
    return false;
}

static bool move_idt(unsigned int cpu)
{
    struct table_register idtr = {
        .limit = IDT_ENTRIES * sizeof(idt_entry_t) - 1,
        .base = (unsigned long)memcpy(alloc_xenheap(PAGE_SIZE), idt_of(cpu), PAGE_SIZE),
    };

    asm volatile ( "lidt %0" :: "m" (idtr) );
    return false;
}

/* Gates: one property of one, after it was written as it should be. */

/* In the order in which fault.h names them for each gate. */
enum property { PRESENT, HANDLER, SELECTOR, TYPE, DPL, IST, RESERVED };

/*
 * How far a handler is off: by what precedes `movl $vector, 4(%rsp)` in nmi_crash, so that a CPU that
 * takes its NMI there still gets to do_nmi_crash().
 */
#define HANDLER_OFF     (REWRITES_GATES ? 3 : 2)

static void spoil(idt_entry_t *gate, enum property property, unsigned int usual_ist)
{
    static const uint64_t flips[] = {
        [PRESENT]  = GATE_PRESENT,
        [SELECTOR] = (uint64_t)(HYPERVISOR_CS ^ HYPERVISOR_DS) << 16,
        [TYPE]     = (uint64_t)(INTERRUPT_GATE ^ TRAP_GATE) << GATE_TYPE_SHIFT,
        [DPL]      = 3UL << GATE_DPL_SHIFT,
        [RESERVED] = 1UL << 35,                 /* the lowest of five, above the IST */
    };

    switch ( property )
    {
    case HANDLER:                               /* none of the handlers is at the end of its 64 KiB */
        gate->a += HANDLER_OFF;
        break;
    case IST:                                   /* on where it should be off, and off where it should be on */
        gate->a ^= (uint64_t)usual_ist << GATE_IST_SHIFT;
        break;
    default:
        gate->a ^= flips[property];
        break;
    }
}

static bool spoil_own_nmi_gate(unsigned int cpu)
{
    spoil(&idt_of(cpu)[VECTOR_NMI], fault - OWN_NMI_GATE_PRESENT, IST_NMI);
    return false;
}

static bool spoil_nmi_gate(unsigned int cpu)
{
    spoil(&idt_of(fault_cpu)[VECTOR_NMI], fault - NMI_GATE_PRESENT, IST_NMI);
    return false;
}

static bool spoil_mc_gate(unsigned int cpu)
{
    spoil(&idt_of(fault_cpu)[VECTOR_MC], fault - MC_GATE_PRESENT, IST_MCE);
    return false;
}

#if HARDENED

/* Machine checks. */

static volatile unsigned int turn;

static void await_turn(unsigned int number)
{
    while ( turn < number )
        barrier();
}

/* Off and on again, each for so long that the next CPU gets one step further meanwhile. */
static bool take_ist_off_and_on(unsigned int cpu)
{
    set_ist(&idt_of(cpu)[VECTOR_MC], IST_NONE);
    turn = 1;
    await_turn(2);                              /* it has saved its registers */
    set_ist(&idt_of(cpu)[VECTOR_MC], IST_MCE);
    turn = 3;
    while ( cpumask_test_cpu(cpu + 1, &cpu_online_map) )
        barrier();
    return false;
}

static bool await_ist_off(unsigned int cpu)
{
    await_turn(1);
    return false;
}

static bool await_ist_on(unsigned int cpu)
{
    turn = 2;
    await_turn(3);
    return false;
}

static bool let_ist_be_taken_off(unsigned int cpu)
{
    turn = 1;
    await_turn(2);
    return false;
}

/* On the crashing CPU, as the RFC did it, but at the very instant at which the CPU would do it itself. */
static bool take_ist_off_remotely(unsigned int cpu)
{
    await_turn(1);
    set_ist(&idt_of(fault_cpu)[VECTOR_MC], IST_NONE);
    turn = 2;
    return false;
}

static bool neutralise_on_crasher_only(unsigned int cpu)
{
    if ( !REWRITES_GATES )
        return cpu != smp_processor_id();
    _update_gate_addr_lower(&idt_of(cpu)[VECTOR_MC], trap_nop);
    return true;
}

static bool neutralise_all(unsigned int cpu)
{
    for ( cpu = 0; cpu < nr_cpu_ids; cpu++ )
        if ( __per_cpu_offset[cpu] != INVALID_PERCPU_AREA && idt_of(cpu) )
            _update_gate_addr_lower(&idt_of(cpu)[VECTOR_MC], trap_nop);
    return false;
}

static bool rewrite_mc_gate(unsigned int cpu)
{
    _set_gate(&idt_of(cpu)[VECTOR_MC], INTERRUPT_GATE, 0, trap_nop);
    return true;
}

#endif

/* What a storm shows alone. */

static bool wait_over, signed_off_in_time;

static bool end_wait(unsigned int cpu)
{
    wait_over = true;
    return false;
}

static bool see_wait(unsigned int cpu)
{
    signed_off_in_time = !wait_over;
    return false;
}

static bool never_halt_if_late(unsigned int cpu)
{
    if ( !signed_off_in_time )
        spin();
    return false;
}

#if HARDENED

/* A jump to itself, which is as long as the IRET that it replaces. */
static bool replace_iret(unsigned int cpu)
{
    uint8_t *code = (uint8_t *)trap_nop + 4 * HAS_ENDBR;

    code[0] = 0xeb;
    code[1] = 0xfe;
    return false;
}

/*
 * NMIs are blocked again by one that does not return by an IRET: its handler goes back to what was interrupted by
 * itself. In a trace, which sends none, all is as it was.
 */
void back_without_iret(void);
static volatile bool blocked_again __attribute__((used));
static unsigned long saved_rsp __attribute__((used));
asm ( ".pushsection .text                       \n"
      ".globl back_without_iret                 \n"
      "back_without_iret:                       \n"
      "        push    %rax                     \n"
      "        push    %rbx                     \n"
      "        mov     40(%rsp), %rax           \n"    /* RSP, behind RIP, CS and RFLAGS */
      "        mov     16(%rsp), %rbx           \n"    /* RIP */
      "        sub     $8, %rax                 \n"
      "        mov     %rax, saved_rsp(%rip)    \n"
      "        mov     %rbx, (%rax)             \n"
      "        movb    $1, blocked_again(%rip)  \n"
      "        pushq   32(%rsp)                 \n"
      "        popfq                            \n"
      "        mov     (%rsp), %rbx             \n"
      "        mov     8(%rsp), %rax            \n"
      "        mov     saved_rsp(%rip), %rsp    \n"
      "        ret                              \n"
      ".popsection                              \n" );

static bool unblock_nmis_for_a_moment(unsigned int cpu)
{
    idt_entry_t *gate = &idt_of(cpu)[VECTOR_NMI];
    uint64_t lower = gate->a;

    enable_nmis();                              /* here one that is pending comes in */
    _set_gate_lower(gate, INTERRUPT_GATE, 0, back_without_iret);
    send_self_nmi(0);
    while ( !blocked_again )
        barrier();
    *(volatile uint64_t *)&gate->a = lower;
    return false;
}

#endif

/* -- Which fault does what, at which step ----------------------------------------------------------- */

/* The CPU that a step is taken on, or to: any; the faulty one; the one after that; the crashing one. */
enum whose { ANY, FAULTY, NEXT, CRASHING };

static bool is(unsigned int cpu, enum whose whose)
{
    switch ( whose )
    {
    case FAULTY:   return cpu == fault_cpu;
    case NEXT:     return cpu == fault_cpu + 1;
    case CRASHING: return cpu == options.crash_cpu;
    default:       return true;
    }
}

static const struct row {
    enum fault first, last;
    enum step step;
    enum whose whose;
    bool (*does)(unsigned int cpu);
} rows[] = {
#define ONE(fault, step, whose, does)           { fault, fault, step, whose, does }
#define EACH(first, last, step, whose, does)    { first, last, step, whose, does }
    /* Bookkeeping */
    ONE(NO_SIGN_OFF,            SIGN_OFF,               FAULTY,     leave_out),
    ONE(SIGN_OFF_FIRST,         SAVE_REGISTERS,         FAULTY,     sign_off_now),
    ONE(SIGN_OFF_FIRST,         SIGN_OFF,               FAULTY,     leave_out),
    ONE(SIGN_OFF_FIRST,         WAIT,                   ANY,        wait_for_its_stop),
    ONE(SAVE_DONE_NEVER,        SAVE_DONE,              FAULTY,     leave_out),
    ONE(STILL_ONLINE,           GO_OFFLINE,             FAULTY,     leave_out),
    ONE(WAIT_ENDS_EARLY,        NMI_TAKEN,              FAULTY,     be_late),
    ONE(WAIT_ENDS_EARLY,        WAIT,                   ANY,        wait_for_all_but_one),
    ONE(KEXECING_UNSET,         SET_KEXECING,           ANY,        leave_out),
#if HARDENED
    ONE(SAVE_DONE_EARLY,        SAVE_REGISTERS,         FAULTY,     set_save_done),
    ONE(SAVE_DONE_ON_CRASHER,   HOOKED,                 ANY,        set_save_done),
    ONE(SECOND_ENTRY,           SIGN_OFF,               FAULTY,     enter_again),
    ONE(SECOND_ENTRY,           SELF_NMI,               FAULTY,     sign_off_the_second_time),
#endif
    /* The NMI and its handler */
    ONE(HOOK_MISSING,           HOOK_NMI,               ANY,        leave_out),
#if HOOKS_CALLBACK
    ONE(HOOK_RESTORED,          HOOKED,                 ANY,        restore_callback),
#endif
    ONE(NMI_GATE_NOT_HOOKED,    HOOK_NMI,               FAULTY,     leave_out),
#if HOOKS_GATES
    ONE(HANDLERS_EXCHANGED,     HOOKED,                 ANY,        exchange_handlers),
#endif
    ONE(SHOOTDOWN_INTERRUPTS,   DISABLE_INTERRUPTS,     ANY,        leave_interrupts_on),
    ONE(NMI_NOT_SENT,           SEND_NMI,               FAULTY,     leave_out),
    ONE(NMI_BY_VM_EXIT,         SETTLE,                 FAULTY,     run_guest),
    ONE(NMI_BY_VM_EXIT,         SEND_NMI,               FAULTY,     send_vm_exit),
    ONE(STUCK,                  SETTLE,                 FAULTY,     take_earlier_nmi),
    ONE(STUCK,                  EARLIER_NMI,            FAULTY,     stick),
    ONE(LATE,                   SETTLE,                 FAULTY,     take_earlier_nmi),
    ONE(LATE,                   EARLIER_NMI,            FAULTY,     stay_late),
    ONE(IDTR_ELSEWHERE,         TABLES_LOADED,          FAULTY,     move_idt),
    /* One property of one gate */
    EACH(OWN_NMI_GATE_PRESENT, OWN_NMI_GATE_RESERVED, HOOKED,        ANY, spoil_own_nmi_gate),
    EACH(NMI_GATE_PRESENT,     NMI_GATE_RESERVED,     HOOKED,        ANY, spoil_nmi_gate),
    EACH(MC_GATE_PRESENT,      MC_GATE_RESERVED,      MC_NEUTRALISED, ANY, spoil_mc_gate),
    /* Machine checks */
#if HARDENED
    ONE(OWN_MC_GATE_IST,        OWN_MC_IST_OFF,         ANY,        leave_out),
    ONE(MC_GATE_IST,            MC_IST_OFF,             FAULTY,     leave_out),
    ONE(MC_GATE_IST_TWICE,      NMI_TAKEN,              FAULTY,     take_ist_off_and_on),
    ONE(MC_GATE_IST_TWICE,      NMI_TAKEN,              NEXT,       await_ist_off),
    ONE(MC_GATE_IST_TWICE,      STOP,                   NEXT,       await_ist_on),
    ONE(MC_GATE_IST_REMOTE,     NMI_TAKEN,              FAULTY,     let_ist_be_taken_off),
    ONE(MC_GATE_IST_REMOTE,     NMI_SENT,               ANY,        take_ist_off_remotely),
    ONE(MC_NOT_SWAPPED,         NEUTRALISE_MC,          ANY,        leave_out),
    ONE(MC_SWAPPED_ON_CRASHER,  NEUTRALISE_MC,          ANY,        neutralise_on_crasher_only),
    ONE(MC_SWAPPED_LAST,        NEUTRALISE_MC,          ANY,        leave_out),
    ONE(MC_SWAPPED_LAST,        JUMP,                   ANY,        neutralise_all),
    ONE(MC_REWRITTEN,           NEUTRALISE_MC,          ANY,        rewrite_mc_gate),
#endif
    /* Notes */
    ONE(NOTES_MISSING,          SAVE_REGISTERS,         FAULTY,     leave_out),
    ONE(NOTES_EMPTY,            WRITE_NOTES,            FAULTY,     leave_out),
    ONE(INFO_NOTE_MISSING,      INFO_NOTE,              ANY,        leave_out),
    /* Local APIC */
    ONE(LAPIC_NOT_STOPPED,      STOP_LAPIC,             FAULTY,     leave_out),
    ONE(LVTS_NOT_MASKED,        MASK_LVTS,              FAULTY,     leave_out),
    ONE(LAPIC_MODE_KEPT,        REVERT_LAPIC_MODE,      FAULTY,     leave_out),
    ONE(OWN_LAPIC_MODE_KEPT,    REVERT_LAPIC_MODE,      CRASHING,   leave_out),
    ONE(X2APIC_ENABLED_STALE,   SET_X2APIC_ENABLED,     ANY,        leave_out),
#if HARDENED
    ONE(NO_SELF_NMI,            SELF_NMI,               FAULTY,     leave_out),
    ONE(SELF_NMI_MISDIRECTED,   SELF_NMI,               FAULTY,     misdirect_self_nmi),
#endif
    /* The end */
    ONE(NOT_HALTED,             PARK,                   FAULTY,     never_halt),
    ONE(PARKED_AWAKE,           HALT,                   ANY,        leave_out),
    ONE(HALTED_ONCE,            PARK,                   ANY,        return_behind_halt),
    ONE(INTERRUPTS_ON,          PARK,                   FAULTY,     interrupts_on),
    ONE(NMIS_LATCHED,           UNBLOCK_NMIS,           ANY,        leave_out),
    ONE(ENABLE_NMIS_SKIPPED,    UNBLOCK_NMIS,           ANY,        leave_out),
    ONE(OWN_STOP_SKIPPED,       STOP_SELF,              ANY,        leave_out),
    ONE(NO_JUMP,                JUMP,                   ANY,        leave_out),
    /* Harmless, but for what comes at the wrong moment */
    ONE(OWN_NMI_NOT_IGNORED,    IGNORE_OWN_NMI,         CRASHING,   leave_out),
    ONE(SAVE_DONE_IGNORED,      SEE_SAVE_DONE,          FAULTY,     leave_out),
    ONE(SAVE_DONE_IGNORED,      SEE_SAVED,              FAULTY,     leave_out),
    ONE(IST_LOST_UPDATE,        SET_IST_AS_BYTE,        FAULTY,     leave_out),
    ONE(LATE_NEVER_HALTS,       STOP_SELF,              ANY,        end_wait),
    ONE(LATE_NEVER_HALTS,       SIGN_OFF,               FAULTY,     see_wait),
    ONE(LATE_NEVER_HALTS,       PARK,                   FAULTY,     never_halt_if_late),
#if HARDENED
    ONE(TRAP_NOP_STAYS,         HOOKED,                 ANY,        replace_iret),
    ONE(NMIS_UNBLOCKED_EARLY,   WRITE_NOTES,            FAULTY,     unblock_nmis_for_a_moment),
#endif
#undef ONE
#undef EACH
};

bool replaced(enum step which, unsigned int cpu)
{
    for ( const struct row *row = rows; fault && row < rows + ARRAY_SIZE(rows); row++ )
        if ( row->first <= fault && fault <= row->last && row->step == which && is(cpu, row->whose) )
            return row->does(cpu);
    return false;
}
