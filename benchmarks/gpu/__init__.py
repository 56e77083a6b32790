"""Measurements on a GPU: kernels against bf16 attention, whole models against transformers' caches, launch tuning.

    make bench-gpu      or: python benchmarks/gpu bench
    make tune           or: python benchmarks/gpu tune

``clock`` counts the time of a command and ends it.  ``passed`` runs the kernel tests (``gate``, with ``selection`` in
pytest) before anything is timed.  ``plan`` says what is measured and what fits, ``subject`` and ``baselines`` make the
contenders, ``timing`` times them side by side.  ``run`` measures ``sweep``, ``models`` and ``updates``, whose cells are
``tasks``; ``results`` keeps the observations and ``report`` draws them.  ``tune`` chooses launch configurations, with
the times of ``trials``, and ``launch_table`` writes them down.  Nothing needs a network, weights, or the package to be
installed (``importable``).
"""
