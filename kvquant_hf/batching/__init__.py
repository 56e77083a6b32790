"""Many requests at once: transformers' continuous batching with our pages as its blocks.

transformers keeps what it is good at: queues, admission, the packed batch of each step, allocation, reference counts,
hashes of shared prefixes, eviction.  Ours is what a block is and who reads it:

    transformers' manager, scheduler, processor
        │  tables of blocks, reference counts          ``allocator.py``: a block is one sealed page of each layer
        │  how much memory, how many blocks            ``sizing.py``: blocks and open pages in one budget
        ▼
    ``cache.py``: update() appends, attend() reads     ``step.py``: rows of the packed batch, grouped into calls
        │                                              ``slots.py``: an open page for each live request
        ▼
    ``ops.append_pages``, ``ops.paged_attention``

``config.py`` has the options, ``manager.py`` what a user holds, ``hooks.py`` the ways in, ``attention.py`` the function
that the model calls, ``prompt.py`` what that does with a first prompt, ``model.py`` which models have blocks,
``report.py`` what a run says of itself, and ``calls.py`` what the two ends of a call tell each other.
"""
