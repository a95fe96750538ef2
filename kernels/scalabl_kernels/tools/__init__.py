"""Tools around the kernel, never imported by a server: compiling it for absent GPUs, and its roofline."""
