/*
 * fault.h - ways to do the crash path wrong, chosen on the command line: fault=NAME fault_cpu=N.
 *
 * The path is written as it should be. What a fault changes is a step with a name, and a row of the table in fault.c
 * says what the fault does there: before the step, or instead of it. The code is the same with and without a fault, so
 * that nothing else distinguishes the generations. What each fault is, and what is to be seen of it, is in faults.py.
 */
#ifndef FAULT_H
#define FAULT_H

#include "xen.h"

#define FAULTS(F)                                               \
    /* Bookkeeping */                                           \
    F(NO_SIGN_OFF,              "no-sign-off")                  \
    F(SIGN_OFF_FIRST,           "sign-off-first")               \
    F(SAVE_DONE_EARLY,          "save-done-early")              \
    F(SAVE_DONE_NEVER,          "save-done-never")              \
    F(SAVE_DONE_ON_CRASHER,     "save-done-on-crasher")         \
    F(STILL_ONLINE,             "still-online")                 \
    F(SECOND_ENTRY,             "second-entry")                 \
    F(WAIT_ENDS_EARLY,          "wait-ends-early")              \
    F(OWNER_WRONG,              "owner-wrong")                  \
    F(KEXECING_UNSET,           "kexecing-unset")               \
    /* The NMI and its handler */                               \
    F(HOOK_MISSING,             "hook-missing")                 \
    F(HOOK_RESTORED,            "hook-restored")                \
    F(NMI_GATE_NOT_HOOKED,      "nmi-gate-not-hooked")          \
    F(HANDLERS_EXCHANGED,       "handlers-exchanged")           \
    F(SHOOTDOWN_INTERRUPTS,     "shootdown-interrupts-on")      \
    F(NMI_NOT_SENT,             "nmi-not-sent")                 \
    F(NMI_BY_VM_EXIT,           "nmi-by-vm-exit")               \
    F(STUCK,                    "stuck")                        \
    F(LATE,                     "late")                         \
    F(IDTR_ELSEWHERE,           "idtr-elsewhere")               \
    /* One property of one gate, in the order of fault.c */     \
    F(OWN_NMI_GATE_PRESENT,     "own-nmi-gate-present")         \
    F(OWN_NMI_GATE_HANDLER,     "own-nmi-gate-handler")         \
    F(OWN_NMI_GATE_SELECTOR,    "own-nmi-gate-selector")        \
    F(OWN_NMI_GATE_TYPE,        "own-nmi-gate-type")            \
    F(OWN_NMI_GATE_DPL,         "own-nmi-gate-dpl")             \
    F(OWN_NMI_GATE_IST,         "own-nmi-gate-ist")             \
    F(OWN_NMI_GATE_RESERVED,    "own-nmi-gate-reserved")        \
    F(NMI_GATE_PRESENT,         "nmi-gate-present")             \
    F(NMI_GATE_HANDLER,         "nmi-gate-handler")             \
    F(NMI_GATE_SELECTOR,        "nmi-gate-selector")            \
    F(NMI_GATE_TYPE,            "nmi-gate-type")                \
    F(NMI_GATE_DPL,             "nmi-gate-dpl")                 \
    F(NMI_GATE_IST,             "nmi-gate-ist")                 \
    F(NMI_GATE_RESERVED,        "nmi-gate-reserved")            \
    F(MC_GATE_PRESENT,          "mc-gate-present")              \
    F(MC_GATE_HANDLER,          "mc-gate-handler")              \
    F(MC_GATE_SELECTOR,         "mc-gate-selector")             \
    F(MC_GATE_TYPE,             "mc-gate-type")                 \
    F(MC_GATE_DPL,              "mc-gate-dpl")                  \
    F(MC_GATE_IST_RESTORED,     "mc-gate-ist-restored")         \
    F(MC_GATE_RESERVED,         "mc-gate-reserved")             \
    /* Machine checks */                                        \
    F(OWN_MC_GATE_IST,          "own-mc-gate-ist")              \
    F(MC_GATE_IST,              "mc-gate-ist")                  \
    F(MC_GATE_IST_TWICE,        "mc-gate-ist-twice")            \
    F(MC_GATE_IST_REMOTE,       "mc-gate-ist-remote")           \
    F(MC_NOT_SWAPPED,           "mc-not-swapped")               \
    F(MC_SWAPPED_ON_CRASHER,    "mc-swapped-on-crasher-only")   \
    F(MC_SWAPPED_LAST,          "mc-swapped-last")              \
    F(MC_REWRITTEN,             "mc-rewritten")                 \
    /* Notes */                                                 \
    F(NOTES_MISSING,            "notes-missing")                \
    F(NOTES_EMPTY,              "notes-empty")                  \
    F(INFO_NOTE_MISSING,        "info-note-missing")            \
    /* Local APIC */                                            \
    F(LAPIC_NOT_STOPPED,        "lapic-not-stopped")            \
    F(LVTS_NOT_MASKED,          "lvts-not-masked")              \
    F(LAPIC_MODE_KEPT,          "lapic-mode-kept")              \
    F(OWN_LAPIC_MODE_KEPT,      "own-lapic-mode-kept")          \
    F(X2APIC_ENABLED_STALE,     "x2apic-enabled-stale")         \
    F(NO_SELF_NMI,              "no-self-nmi")                  \
    F(SELF_NMI_MISDIRECTED,     "self-nmi-misdirected")         \
    /* The end */                                               \
    F(NOT_HALTED,               "not-halted")                   \
    F(PARKED_AWAKE,             "parked-awake")                 \
    F(HALTED_ONCE,              "halted-once")                  \
    F(INTERRUPTS_ON,            "interrupts-on")                \
    F(NMIS_LATCHED,             "nmis-latched")                 \
    F(ENABLE_NMIS_SKIPPED,      "enable-nmis-skipped")          \
    F(OWN_STOP_SKIPPED,         "own-stop-skipped")             \
    F(NO_JUMP,                  "no-jump")                      \
    /* Harmless, but for what comes at the wrong moment */      \
    F(OWN_NMI_NOT_IGNORED,      "own-nmi-not-ignored")          \
    F(SAVE_DONE_IGNORED,        "save-done-ignored")            \
    F(IST_LOST_UPDATE,          "ist-lost-update")              \
    F(TRAP_NOP_STAYS,           "trap-nop-stays")               \
    F(NMIS_UNBLOCKED_EARLY,     "nmis-unblocked-early")         \
    F(LATE_NEVER_HALTS,         "late-never-halts")

enum fault {
    NO_FAULT,
#define F(constant, name) constant,
    FAULTS(F)
#undef F
};

extern enum fault fault;
extern unsigned int fault_cpu;                  /* the CPU that does it wrong, or to which it is done */

enum fault fault_by_name(const char *name);     /* NO_FAULT for an unknown name */

/* In the order of the path; by the file that has them. */
enum step {
    TABLES_LOADED,                              /* traps.c: the CPU uses its own IDT */
    SET_IST_AS_BYTE,
    SETTLE,                                     /* domain.c: the CPU is as it will be before the crash */
    EARLIER_NMI,                                /* an NMI before the crash */
    SET_KEXECING,                               /* kexec.c */
    SEE_SAVED,                                  /* whether it has saved its registers already */
    WRITE_NOTES,
    INFO_NOTE,                                  /* and crash.c */
    /* crash.c: the crashing CPU */
    DISABLE_INTERRUPTS,
    OWN_MC_IST_OFF,
    MC_IST_OFF,                                 /* of another CPU's gate, on either CPU */
    HOOK_NMI,                                   /* of one CPU, where each has its own */
    HOOKED,
    SEND_NMI,                                   /* smp.c: to one CPU */
    NMI_SENT,
    WAIT,
    STOP_SELF,
    SET_X2APIC_ENABLED,
    /* crash.c: each other CPU */
    IGNORE_OWN_NMI,                             /* and on the crashing one */
    SEE_SAVE_DONE,
    NMI_TAKEN,
    SAVE_REGISTERS,
    STOP,
    SAVE_DONE,
    SIGN_OFF,
    SELF_NMI,
    PARK,
    HALT,                                       /* or stay where it is, awake */
    /* apic.c and smp.c: whichever CPU stops */
    STOP_LAPIC,
    MASK_LVTS,
    REVERT_LAPIC_MODE,
    GO_OFFLINE,
    /* machine_kexec.c */
    NEUTRALISE_MC,                              /* of one CPU, or of all at once */
    MC_NEUTRALISED,
    UNBLOCK_NMIS,
    JUMP,
};

/* Whether a fault does something else instead, on this CPU or to it. */
bool replaced(enum step which, unsigned int cpu);

/* What follows is a step that a fault may come before, or replace. */
#define step(which, cpu)    if ( !replaced(which, cpu) )

/* A point between two steps. */
static inline void reached(enum step which, unsigned int cpu) { (void)replaced(which, cpu); }

/* one_cpu_only() has recorded whose crash it is. */
void owner_recorded(int *owner);

#endif /* FAULT_H */
