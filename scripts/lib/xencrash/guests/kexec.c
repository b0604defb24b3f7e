/*
 * kexec.c - the way into the crash, and the notes that it leaves for the crash kernel.
 *
 * kexec_crash() is the path from its first instruction to its last: one CPU only, its own notes, the
 * shootdown, the notes about Xen, and the jump.
 *
 * Each CPU has a buffer of ELF notes, laid out beforehand: its general registers, its control registers, and
 * in CPU 0's what is known of Xen. crash_saved_cpus says who has filled his in.
 */
#include "xen.h"
#include "fault.h"

bool kexecing;

/* Bits of kexec_flags, as Xen's public/kexec.h and kexec.c number them. */
#define KEXEC_IMAGE_CRASH_BASE  2               /* and 3: two crash images can be loaded */
#define KEXEC_FLAG_CRASH_POS    5               /* which of them is current */
#define KEXEC_FLAG_IN_PROGRESS  6

static unsigned long kexec_flags;

/* -- Notes ------------------------------------------------------------------------------------------ */

/* gABI, "Note Section"; types as Linux's and Xen's public/elfnote.h have them. */
#define NT_PRSTATUS             1
#define XEN_ELFNOTE_CRASH_INFO  0x1000001
#define XEN_ELFNOTE_CRASH_REGS  0x1000002

typedef struct { uint32_t namesz, descsz, type; } Elf_Note;

/* What `struct user_regs_struct` of Linux is: the order of the registers in NT_PRSTATUS. */
struct elf_regs {
    uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax;
    uint64_t rip, cs, rflags, rsp, ss, thread_fs, thread_gs, ds, es, fs, gs;
};

struct prstatus { uint8_t before[112]; struct elf_regs regs; uint64_t fpvalid; };
struct crash_xen_core { uint64_t cr0, cr2, cr3, cr4; };

/* A CPU's buffer: both notes, and behind CPU 0's the one about Xen. Names are padded to 4 bytes. */
struct cpu_notes {
    Elf_Note core;
    char core_name[8];
    struct prstatus status;
    Elf_Note control;
    char control_name[4];
    struct crash_xen_core control_regs;
    Elf_Note info;
    char info_name[4];
    struct crash_xen_info xen;
} __attribute__((packed));
_Static_assert(offsetof(struct cpu_notes, status) == 20, "CORE");
_Static_assert(offsetof(struct cpu_notes, control_regs) == 372, "CRASH_REGS");
_Static_assert(offsetof(struct cpu_notes, xen) == 420, "CRASH_INFO");

typedef struct { void *start; size_t size; } crash_note_range_t;

static crash_note_range_t *crash_notes;
static cpumask_t crash_saved_cpus;

static void setup_note(Elf_Note *note, const char *name, uint32_t namesz, uint32_t type, uint32_t descsz)
{
    note->namesz = namesz;
    note->descsz = descsz;
    note->type = type;
    memcpy(note + 1, name, namesz);
}

static void init_notes(unsigned int cpu)
{
    size_t size = cpu ? offsetof(struct cpu_notes, info) : sizeof(struct cpu_notes);
    struct cpu_notes *notes = alloc_xenheap(size);

    setup_note(&notes->core, "CORE", 5, NT_PRSTATUS, sizeof(notes->status));
    setup_note(&notes->control, "Xen", 4, XEN_ELFNOTE_CRASH_REGS, sizeof(notes->control_regs));
    if ( cpu == 0 )
        setup_note(&notes->info, "Xen", 4, XEN_ELFNOTE_CRASH_INFO, sizeof(notes->xen));
    crash_notes[cpu] = (crash_note_range_t){ notes, size };
}

/*
 * The registers of Xen at this very point, not those of whatever was interrupted. A function of its own
 * until 4.15, and then rip is where that begins.
 */
#if SAVES_CURRENT_RIP
__attribute__((always_inline)) inline
#else
noinline
#endif
static void elf_core_save_regs(struct elf_regs *regs)
{
#define SAVE(reg)           asm volatile ( "mov %%" #reg ", %0" : "=m" (regs->reg) )
#define SAVE_SELECTOR(seg)  ({ uint64_t seg_; asm volatile ( "mov %%" #seg ", %0" : "=r" (seg_) ); regs->seg = seg_; })
    SAVE(r15); SAVE(r14); SAVE(r13); SAVE(r12); SAVE(rbp); SAVE(rbx); SAVE(r11); SAVE(r10);
    SAVE(r9);  SAVE(r8);  SAVE(rax); SAVE(rcx); SAVE(rdx); SAVE(rsi); SAVE(rdi); SAVE(rsp);
    SAVE_SELECTOR(cs); SAVE_SELECTOR(ss); SAVE_SELECTOR(ds);
    SAVE_SELECTOR(es); SAVE_SELECTOR(fs); SAVE_SELECTOR(gs);
#undef SAVE
#undef SAVE_SELECTOR
    asm volatile ( "pushfq; popq %0" : "=r" (regs->rflags) );

    if ( SAVES_CURRENT_RIP )
    {
        asm volatile ( "lea 0(%%rip), %0" : "=r" (regs->rip) );
        regs->thread_fs = rdmsr(MSR_FS_BASE);
        regs->thread_gs = rdmsr(MSR_GS_BASE);
    }
    else
        regs->rip = (unsigned long)elf_core_save_regs;
}

/* Says so first, then does it: the notes of a CPU that is in here are not complete. */
noinline void kexec_crash_save_cpu(void)
{
    unsigned int cpu = smp_processor_id();
    struct cpu_notes *notes = crash_notes[cpu].start;

    step ( SEE_SAVED, cpu )
        if ( cpumask_test_cpu(cpu, &crash_saved_cpus) )
            return;
    cpumask_set_cpu(cpu, &crash_saved_cpus);

    step ( WRITE_NOTES, cpu )
    {
        elf_core_save_regs(&notes->status.regs);
        notes->control_regs = (struct crash_xen_core){ read_cr(0), read_cr(2), read_cr(3), read_cr(4) };
    }
}

/* What a tool needs to make sense of Xen in the dump. The caller adds what is known to the architecture. */
noinline struct crash_xen_info *kexec_crash_save_info(void)
{
    static const char extra_version[] = "-reference-guest", changeset[] = "unavailable", compiler[] = __VERSION__;
    static const char date[] = "unavailable", time[] = "unavailable";
    struct cpu_notes *notes = crash_notes[0].start;

    step ( INFO_NOTE, smp_processor_id() )
        notes->xen = (struct crash_xen_info){
            .xen_major_version = 4,
            .xen_minor_version = XEN_MINOR,
            .xen_extra_version = image_pa(extra_version),
            .xen_changeset     = image_pa(changeset),
            .xen_compiler      = image_pa(compiler),
            .xen_compile_date  = image_pa(date),
            .xen_compile_time  = image_pa(time),
        };
    return &notes->xen;
}

/* -- Loading ---------------------------------------------------------------------------------------- */

extern const char crash_image[], crash_image_end[];

/* What `kexec -p` does: the image in its place, a buffer of notes for every CPU number, and the flag. */
void kexec_init(void)
{
    memcpy(__va(CRASH_IMAGE_START), crash_image, crash_image_end - crash_image);

    crash_notes = alloc_xenheap(nr_cpu_ids * sizeof(*crash_notes));
    for ( unsigned int cpu = 0; cpu < nr_cpu_ids; cpu++ )
        init_notes(cpu);

    kexec_flags |= 1UL << KEXEC_IMAGE_CRASH_BASE;
}

/*
 * For CPUs that are too late: the crash image says when it runs. Without PAUSE, for which QEMU's TCG takes
 * the lock that the crashing CPU needs for its delays.
 */
noinline void wait_for_crash_image(void)
{
    while ( !((volatile uint64_t *)__va(CRASH_IMAGE_START))[CRASH_IMAGE_RUNS] )
        barrier();
}

/* -- The crash -------------------------------------------------------------------------------------- */

/* Returns on the CPU that comes first. No other one ever gets past this, until the NMI stops it. */
static noinline bool one_cpu_only(void)
{
#if RECORDS_OWNER
    static int crashing_cpu = -1;
    int cpu = smp_processor_id(), owner = -1;

    if ( !__atomic_compare_exchange_n(&crashing_cpu, &owner, cpu, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) )
    {
        if ( owner == cpu )
            return false;
        for ( ; ; )
            halt();
    }
    kexec_flags |= 1UL << KEXEC_FLAG_IN_PROGRESS;
    owner_recorded(&crashing_cpu);
#else
    bool taken;

    asm volatile ( "lock btsq %2, %1" : "=@ccc" (taken), "+m" (kexec_flags)
                                      : "i" (KEXEC_FLAG_IN_PROGRESS) : "memory" );
    while ( taken )
        barrier();
#endif
    return true;
}

noinline void kexec_crash(void)
{
    unsigned long current = kexec_flags >> KEXEC_FLAG_CRASH_POS & 1;

    if ( !(kexec_flags >> (KEXEC_IMAGE_CRASH_BASE + current) & 1) )
        return;

    step ( SET_KEXECING, smp_processor_id() )
        kexecing = true;

    if ( !one_cpu_only() )
    {
        printk("Reentered the crash path.  Something is very broken\n");
        return;
    }

#if ANNOUNCES_KEXEC
    printk("Executing kexec image on cpu%u\n", smp_processor_id());
#endif
    kexec_crash_save_cpu();
    machine_crash_shutdown();
    machine_kexec();
}
