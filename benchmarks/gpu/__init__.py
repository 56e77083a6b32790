"""Measurements on a GPU: kernels against bf16 attention, whole models against transformers' caches, launch tuning.

    make bench-gpu      or: python benchmarks/gpu bench
    make tune           or: python benchmarks/gpu tune

``gate`` runs the kernel tests before anything is timed.  ``plan`` says what is measured and what fits, ``subject`` and
``baselines`` make the contenders, ``timing`` times them side by side.  The three parts of a run are ``sweep``,
``updates`` and ``models``; ``results`` keeps the observations and ``report`` draws them.  ``tune`` chooses launch
configurations and ``launch_table`` writes them down.  Nothing needs a network, weights, or the package to be installed
(``importable``).
"""
