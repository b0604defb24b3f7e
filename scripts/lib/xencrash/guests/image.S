/*
 * image.S - the crash image, as it waits inside Xen's until it is loaded.
 */
        .section .rodata, "a", @progbits
        .globl  crash_image, crash_image_end
crash_image:
        .incbin CRASH_IMAGE
crash_image_end:

        .section .note.GNU-stack, "", @progbits
