"""A tiny language model that really retrieves a needle, with weights that are written down instead of trained.

The simulated Spark serves it with the real vLLM, so that a verification of long-context retrieval exercises the real
server. `python3 -m sim.checkpoint.build --out DIR` writes it; README.md in this folder says how it works.
"""
