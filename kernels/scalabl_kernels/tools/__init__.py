"""Development tools for the kernel: compiling it for GPUs that are not present, and its roofline. Not used by the server."""
