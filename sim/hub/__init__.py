"""A local server that speaks the Hugging Face hub's protocol, for the simulated Spark and for tests of a download.

`python3 -m sim.hub --root DIR` serves DIR/<org>/<name>/ to the unmodified huggingface_hub downloader (HF_ENDPOINT) and
can play the faults of a real network and a real hub on request. README.md in this folder is the reference.
"""
