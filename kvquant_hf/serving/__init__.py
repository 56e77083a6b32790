"""An OpenAI server whose keys and values are quantized pages: transformers' own application and handlers, our engine.

    ``gate.py``       what comes in: keys, how many at once, who went away
        │
    transformers' application (``build_server``) and handlers; ours add what they leave out
        │             ``application.py`` puts them together, ``requests.py`` checks bodies,
        │             ``handlers.py`` reads settings, ``limits.py`` lengths
        ▼
    ``batched.py``    requests into the manager of ``kvquant_hf.batching``, answers out, token by token
    ``sequential.py`` one request after the other, for models that cannot be batched
        │             ``stops.py`` ends answers at stop strings
        ▼
    ``ledger.py``     what became of each request; ``metrics.py`` and ``/kvquant/report`` tell it

``options.py`` is what a server is asked for, ``models.py`` which models it answers for, ``run.py`` the
process, ``replicas.py`` several of them behind one address.
"""
