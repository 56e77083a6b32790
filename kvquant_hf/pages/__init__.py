"""Pages and what holds them: tensors, integers and locks; no transformers, and no codec by name.

``pool.py`` has the physical pages, ``budget.py`` bounds them, ``offload.py`` keeps them in the CPU's memory.
``table.py`` says which page holds which tokens; ``store.py`` is one layer's tokens, ``static_store.py`` the same in
memory reserved once, with ``static_ops.py`` for graphs.  ``layout.py`` and ``parameters.py`` are what both know of keys
and values, ``padding.py`` keeps padding out of scales, ``views.py`` is what a store shows of itself.
"""
