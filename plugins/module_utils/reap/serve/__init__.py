"""The main process of reap.service: one model container from its start gate to its removal.

``config`` what to run; ``supervisor`` the life of the process; ``docker``, ``cgroups``, ``shm`` what it does to the
host; ``probe`` what it asks the model; ``progress`` what vLLM's log says of the load; ``generations`` what served
before; ``apply`` what a provision does to the unit; ``state`` what others read.
"""
