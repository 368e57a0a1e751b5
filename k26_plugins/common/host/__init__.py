"""Read what the host machine offers: cores, memory, control groups, a device's runtime, a cache folder."""
