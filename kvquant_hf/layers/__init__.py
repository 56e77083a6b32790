"""One layer of a cache, and the ways from it to attention.

``paged.py`` puts the checks around a store; ``sliding.py`` gives pages back at the front, ``static.py`` works in memory
reserved once.  ``carrier.py`` and ``static_carrier.py`` are what ``update`` returns, ``readonly.py`` keeps others from
writing into it, ``attention.py`` takes it to the kernels, ``steps.py`` makes a step happen in all layers or in none.
"""
