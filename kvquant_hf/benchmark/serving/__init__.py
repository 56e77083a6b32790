"""Many requests in batches that a budget of memory allows.

``serve.py`` runs it: ``workload.py`` draws the requests, ``batching.py`` fills the batches.  ``rows.py`` is what was
measured, ``table.py`` shows rows, and ``results.py`` is the whole run.
"""
