/*
 * generation.h - what differs between the generations of the crash path.
 *
 * Each row is one difference, each column one generation, named in the line
 * that begins with COLUMNS.  The build gives the number of the column as
 * GENERATION; a row is then the constant to use in C, assembler and linker
 * script.  xencrash.guests reads the same rows to know which fault makes
 * sense where, so keep one row to a line.
 *
 * A generation is called after the first release that has it.  The two RFCs
 * are the patch of 2012-12-04: as posted, and with the decrement that its
 * author missed in his own answer to it.
 *
 * Hashes are commits of Xen.
 */
#ifndef GENERATION_H
#define GENERATION_H

#define ROW(...)              ROW_OF(GENERATION, __VA_ARGS__)
#define ROW_OF(column, ...)   ROW_COLUMN(column, __VA_ARGS__)
#define ROW_COLUMN(column, ...) COLUMN_ ## column(__VA_ARGS__)
#define COLUMN_0(a, ...) a
#define COLUMN_1(a, b, ...) b
#define COLUMN_2(a, b, c, ...) c
#define COLUMN_3(a, b, c, d, ...) d
#define COLUMN_4(a, b, c, d, e, ...) e
#define COLUMN_5(a, b, c, d, e, f, ...) f
#define COLUMN_6(a, b, c, d, e, f, g, ...) g
#define COLUMN_7(a, b, c, d, e, f, g, h, ...) h
#define COLUMN_8(a, b, c, d, e, f, g, h, i) i

/* COLUMNS                            4.2.0 rfc-v1 rfc-v1-fixed 4.3.0 4.3.2 4.3.4 4.17.0 4.21.0 4.21.2 */

/* -- How the other CPUs come to do_nmi_crash ------------------------------------------------------- */
/* Their own NMI gate leads to nmi_crash (77ad1faa6b; undone by cbeeaa7da0). */
#define HOOKS_GATES               ROW(    0,     1,           1,    1,    1,    0,     0,     0,     0)
/* The RFC writes those gates whole, three stores each, and takes their IST away. */
#define REWRITES_GATES            ROW(    0,     1,           1,    0,    0,    0,     0,     0,     0)
/* exception_table[] leads there (cbeeaa7da0; table gone with 327db3837a). */
#define HOOKS_EXCEPTION_TABLE     ROW(    0,     0,           0,    0,    0,    1,     0,     0,     0)
/* nmi_callback leads there (G0's own way; again from e7f147bf4a). */
#define HOOKS_CALLBACK            ROW(    1,     0,           0,    0,    0,    0,     1,     1,     1)

/* -- What is done with machine checks and NMIs ----------------------------------------------------- */
/* The patch itself: crash_save_done, the self-NMI, #MC neutralised, NMIs unlatched at the end. */
#define HARDENED                  ROW(    0,     1,           1,    1,    1,    1,     1,     1,     1)
/* The crashing CPU's own NMI gate leads to trap_nop (given up by ad9c7d86c9). */
#define OWN_GATE_TRAP_NOP         ROW(    0,     1,           1,    1,    1,    1,     1,     1,     0)
/* machine_kexec() reads per_cpu(idt) of absent CPUs too (9c20d3c591; mended by 2c9829a261). */
#define READS_ABSENT_IDTS         ROW(    0,     0,           0,    0,    0,    0,     0,     1,     0)

/* set_ist() stores the one byte (5b8d8a1922, 4.11); before, it reads and writes half a gate. */
#define SETS_IST_AS_BYTE          ROW(    0,     0,           0,    0,    0,    0,     1,     1,     1)

/* -- Bookkeeping ----------------------------------------------------------------------------------- */
/* waiting_for_crash_ipi, a counter; otherwise waiting_to_crash, a mask (f12c1f0b09). */
#define WAITS_FOR_COUNTER         ROW(    1,     1,           1,    1,    0,    0,     0,     0,     0)
/* A stopped CPU signs off. The RFC as posted forgets to. */
#define SIGNS_OFF                 ROW(    1,     0,           1,    1,    1,    1,     1,     1,     1)
/* The outcome of the shootdown is said on the console (f12c1f0b09). */
#define REPORTS_SHOOTDOWN         ROW(    0,     0,           0,    0,    1,    1,     1,     1,     1)
/* one_cpu_only() remembers who crashed, and knows re-entry (470f58c159). */
#define RECORDS_OWNER             ROW(    0,     0,           0,    0,    1,    1,     1,     1,     1)
/* "Executing kexec image on cpuN" (4509ada6ba). */
#define ANNOUNCES_KEXEC           ROW(    0,     0,           0,    0,    0,    0,     1,     1,     1)
/* do_nmi() keeps a nesting counter in irq_stat[] and a total per CPU (88f8b8daa9); before, a total only. */
#define COUNTS_NMI_NESTING        ROW(    0,     0,           0,    0,    0,    0,     1,     1,     1)
/* The registers saved are those of the point where they are saved, with FS and GS base (1e15dcfbae). */
#define SAVES_CURRENT_RIP         ROW(    0,     0,           0,    0,    0,    0,     1,     1,     1)

/* -- Local APIC ------------------------------------------------------------------------------------ */
/* The boot mode is written back even when the mode never changed (until 77ffa26374). */
#define ALWAYS_REVERTS_LAPIC      ROW(    1,     1,           1,    1,    1,    1,     0,     0,     0)
/* clear_local_APIC() clears the logical destination (12a4168377). */
#define CLEARS_LDR                ROW(    0,     0,           0,    0,    0,    0,     1,     1,     1)

/* -- Names and tables ------------------------------------------------------------------------------ */
/* exception_table[] dispatches exceptions, and nmi_callback rests at a dummy (until 327db3837a). */
#define HAS_EXCEPTION_TABLE       ROW(    1,     1,           1,    1,    1,    1,     0,     0,     0)
/* bsp_idt and per_cpu(idt); otherwise idt_table and idt_tables[] (b7cfb45aaf, 9c20d3c591). */
#define HAS_PER_CPU_IDT           ROW(    0,     0,           0,    0,    0,    0,     0,     1,     1)
/* entry_NMI, entry_MC ...; otherwise nmi, machine_check ... (abe93fc8aa). */
#define HAS_ENTRY_NAMES           ROW(    0,     0,           0,    0,    0,    0,     0,     1,     1)
/* enable_nmis is a function of entry.S; otherwise inline (7e9b3599f5). */
#define HAS_ENABLE_NMIS           ROW(    0,     1,           1,    1,    1,    1,     0,     0,     0)
/* Entry points begin with ENDBR64. */
#define HAS_ENDBR                 ROW(    0,     0,           0,    0,    0,    0,     1,     1,     1)
/* per_cpu(tss_page); otherwise per_cpu(init_tss) (7888440625). */
#define HAS_TSS_PAGE              ROW(    0,     0,           0,    0,    0,    0,     1,     1,     1)
/* An absent CPU's per-CPU addresses are non-canonical; otherwise small numbers (7cfb005362). */
#define POISONS_PERCPU            ROW(    0,     0,           0,    0,    1,    1,     1,     1,     1)

/* -- Layout ---------------------------------------------------------------------------------------- */
/* Where the gigabyte of the image begins (4b28bf6ae9, 5af040ef8b). */
#define XEN_VIRT_START ROW(0xffff82c480000000, 0xffff82c480000000, 0xffff82c480000000, 0xffff82c4c0000000, 0xffff82c4c0000000, 0xffff82c4c0000000, 0xffff82d040000000, 0xffff82d040000000, 0xffff82d040000000)
/* _start - XEN_VIRT_START (7ed93f3a0d). */
#define START_OFFSET   ROW(0x100000, 0x100000, 0x100000, 0x100000, 0x100000, 0x100000, 0x200000, 0x200000, 0x200000)
/* The gigabyte of fixed mappings; the APICs are as far in it as in the fourth gigabyte of physical memory. */
#define FIXMAP_GIGABYTE ROW(0xffff82c3c0000000, 0xffff82c3c0000000, 0xffff82c3c0000000, 0xffff82c3c0000000, 0xffff82c3c0000000, 0xffff82c3c0000000, 0xffff82cfc0000000, 0xffff82cfc0000000, 0xffff82cfc0000000)
/* IST numbers (6001660473); 0: none. */
#define IST_NMI                   ROW(    2,     2,           2,    2,    2,    2,     2,     2,     2)
#define IST_MCE                   ROW(    3,     3,           3,    3,    3,    3,     1,     1,     1)
#define IST_DF                    ROW(    1,     1,           1,    1,    1,    1,     4,     4,     4)
#define IST_DB                    ROW(    0,     0,           0,    0,    0,    0,     3,     3,     3)
/* Pages of a stack below the IST stacks: one for shadow stacks (6001660473). */
#define IST_FIRST_PAGE            ROW(    0,     0,           0,    0,    0,    0,     1,     1,     1)
/* sizeof(struct cpu_info), and how far processor_id lies from its end. */
#define CPU_INFO_SIZE             ROW(  232,   232,         232,  232,  232,  232,   264,   248,   248)
#define CPU_INFO_ID               ROW(   32,    32,          32,   32,   32,   32,    64,    64,    64)
/* What the CRASH_INFO note says; the RFC was for the tree that became 4.3. */
#define XEN_MINOR                 ROW(    2,     3,           3,    3,    3,    3,    17,    21,    21)

#endif /* GENERATION_H */
