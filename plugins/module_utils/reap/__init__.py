"""Every decision of the recipe, as plain Python: standard library only, no Ansible import.

The same package runs in three places: in the modules and filters on the controller, as a zipapp on the
managed host (``/opt/reap/bin/reap``), and from the repository
(``PYTHONPATH=plugins/module_utils python3 -m reap``).
"""

__version__ = "0.1.0"
