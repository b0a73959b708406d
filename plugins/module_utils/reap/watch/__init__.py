"""The memory watchdog: decides in ``policy``, reads and kills in ``loop``, tells in ``secretary``.

``policy`` and ``series`` touch nothing outside the process, so a recorded or invented memory series gives the
same decisions in a test, in ``reap watch --replay`` and on the host.
"""
