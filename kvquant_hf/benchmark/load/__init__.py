"""A load of requests against running servers: transformers' own and ours, at the same bytes of keys and values.

``sizing.py`` makes a budget equal for all, ``servers.py`` starts them, ``prompts.py`` cuts texts of known lengths.
``client.py`` sends requests and notes when what came back (``answers.py``), ``gate.py`` lets no server be timed that
answers wrongly, and ``run.py`` gives each its load in turn.  ``rows.py`` is what was measured, ``table.py`` and
``figure.py`` show it, ``results.py`` is the whole run.
"""
