"""A model revision on a host: downloaded once, whole, verified, and never served half.

``engine.fetch`` is the whole step. The other modules are its parts: ``plan`` (what the hub says the revision holds),
``manifest`` (what this host has verified), ``store`` (the folders, locks, space), ``hub`` and ``worker`` (the download,
in child processes that can be killed), ``local`` (import from a disk or a Hugging Face cache), ``peers`` (from another
host), ``progress`` (the file a person or a program watches).
"""
