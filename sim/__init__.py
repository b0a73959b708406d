"""The simulated Spark: systemd hosts in containers, a local OCI registry and a local model hub, on one machine.

Standard library only, so that `python3 -m sim` runs before any virtual environment exists.
"""
