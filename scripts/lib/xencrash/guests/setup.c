/*
 * setup.c - the boot CPU's way from head.S to its idle loop, and the command line.
 */
#include "xen.h"
#include "fault.h"

__attribute__((aligned(STACK_SIZE), section(".bss.stack"))) char cpu0_stack[STACK_SIZE];

struct options options;

/* -- Command line ----------------------------------------------------------------------------------- */

static unsigned int number(const char *digits)
{
    unsigned int value = 0;

    if ( !*digits )
        panic("a number is missing on the command line");
    for ( ; *digits; digits++ )
    {
        if ( *digits < '0' || *digits > '9' )
            panic("no number: %s", digits);
        value = value * 10 + *digits - '0';
    }
    return value;
}

static bool fault_cpu_given;

/* `value` is what stands behind the '=', or "". */
static void set_option(const char *name, const char *value)
{
    if ( streq(name, "fault") )
    {
        fault = fault_by_name(value);
        if ( !fault )
            panic("no fault of this name: %s", value);
    }
    else if ( streq(name, "fault_cpu") )
    {
        fault_cpu = number(value);
        fault_cpu_given = true;
    }
    else if ( streq(name, "crash_cpu") )
        options.crash_cpu = number(value);
    else if ( streq(name, "crash") && streq(value, "auto") )
        options.crash_by_itself = true;
    else if ( streq(name, "context") && streq(value, "nmi") )
        options.crash_in_nmi = true;
    else if ( streq(name, "nr_cpu_ids") )
        options.nr_cpu_ids = number(value);
    else if ( streq(name, "x2apic") && streq(value, "") )
        options.x2apic = true;
    else if ( streq(name, "x2apic") && streq(value, "firmware") )
        options.firmware_x2apic = true;
    else if ( streq(name, "exit") )
        options.exit = true;
    else
        panic("no such option: %s=%s", name, value);
}

/* Words; the first is the kernel's name. Cut up in place. */
static void parse_command_line(char *text)
{
    bool first = true;

    while ( *text )
    {
        char *name = text, *value = NULL;
        bool last;

        for ( ; *text && *text != ' '; text++ )
            if ( *text == '=' && !value )
            {
                *text = '\0';
                value = text + 1;
            }
        last = !*text;
        *text = '\0';
        if ( !first && *name )
            set_option(name, value ?: text);
        first = false;
        if ( !last )
            text++;
    }
}

/* Multiboot Specification 0.6.96, 3.3. */
struct multiboot_info { uint32_t flags, mem_lower, mem_upper, boot_device, cmdline; };
#define MULTIBOOT_HAS_CMDLINE (1U << 2)

static void check_options(void)
{
    if ( options.crash_cpu >= nr_cpu_ids || !cpumask_test_cpu(options.crash_cpu, &cpu_present_map) )
        panic("crash_cpu=%u: there is no such CPU", options.crash_cpu);
    if ( !fault_cpu_given )                     /* the first that is not the crashing one */
        fault_cpu = options.crash_cpu == 0;
    if ( fault && (fault_cpu >= nr_cpu_ids || !cpumask_test_cpu(fault_cpu, &cpu_present_map)) )
        panic("fault_cpu=%u: there is no such CPU", fault_cpu);
    if ( fault == NMIS_LATCHED )
        options.crash_in_nmi = true;
    if ( (options.x2apic || options.firmware_x2apic) && !has_x2apic() )
        panic("x2apic: this processor has none");
}

/* -- Boot ------------------------------------------------------------------------------------------- */

/* Mask all inputs of both 8259s: Intel 8259A datasheet, OCW1. */
static void mask_8259(void)
{
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}

void __start_xen(unsigned long multiboot)
{
    const struct multiboot_info *info = __va(multiboot);

    percpu_init_areas();
    init_cpu_info(0, cpu0_stack);
    console_init();
    trap_init();
    load_system_tables();

    if ( info->flags & MULTIBOOT_HAS_CMDLINE )
        parse_command_line(__va(info->cmdline));
    find_cpus();
    check_options();
    kexec_init();

    mask_8259();
    early_cpu_init();
    record_boot_APIC_mode();
    if ( options.x2apic )
        enable_x2apic();
    x2apic_enabled = current_local_apic_mode() == APIC_MODE_X2APIC;
    setup_local_APIC();

    cpumask_set_cpu(0, &cpu_online_map);
    printk("xencrash reference guest, generation " GENERATION_NAME ", %s, boot mode %s\n",
           x2apic_enabled ? "x2APIC" : "xAPIC", options.firmware_x2apic ? "x2APIC" : "xAPIC");
    smp_boot_cpus();
    idle_loop();
}
