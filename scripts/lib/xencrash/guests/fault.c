/*
 * fault.c - which fault was chosen, and the faults that spoil one property of a gate.
 */
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

/* In the order in which fault.h names them for each gate. */
enum property { PRESENT, HANDLER, SELECTOR, TYPE, DPL, IST, RESERVED };

/*
 * How far a handler is off: by what is in front of `movl $vector, 4(%rsp)` in nmi_crash, so that a CPU that
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

void spoil_nmi_gate(unsigned int crashing_cpu)
{
    if ( fault >= OWN_NMI_GATE_PRESENT && fault <= OWN_NMI_GATE_RESERVED )
        spoil(&idt_of(crashing_cpu)[VECTOR_NMI], fault - OWN_NMI_GATE_PRESENT, IST_NMI);
    else if ( fault >= NMI_GATE_PRESENT && fault <= NMI_GATE_RESERVED )
        spoil(&idt_of(fault_cpu)[VECTOR_NMI], fault - NMI_GATE_PRESENT, IST_NMI);
}

void spoil_mc_gate(void)
{
    if ( fault >= MC_GATE_PRESENT && fault <= MC_GATE_RESERVED )
        spoil(&idt_of(fault_cpu)[VECTOR_MC], fault - MC_GATE_PRESENT, IST_MCE);
}
