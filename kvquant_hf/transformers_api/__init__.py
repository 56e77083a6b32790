"""Everything that depends on transformers' own signatures.

When transformers changes, this is the folder to change: ``contract.py`` (a table of every name, signature and hook that
we rely on), ``layers.py`` (the methods of a cache layer), ``attention.py`` (attention functions), ``generate.py``
(names and functions that are extended), ``observe.py`` (a cache that shows what a model stores).

Nothing is imported here, so that the table can be checked before anything else is.
"""
