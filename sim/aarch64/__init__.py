"""An emulated aarch64 machine that looks like a Spark: its own kernel, UEFI, 122 GB of MemTotal (docs/aarch64.md)."""
