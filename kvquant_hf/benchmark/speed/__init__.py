"""Caches side by side, one call at a time.

``compare.py`` runs it: ``check.py`` comes before any time, ``race.py`` times decode steps in turn, ``apart.py``
measures memory in processes of their own.  ``rows.py`` is what was measured; ``table.py`` and ``figure.py`` show rows,
and ``results.py`` is the whole run.
"""
