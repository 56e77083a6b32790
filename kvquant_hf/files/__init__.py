"""Everything that is written to disk and read back: ``cache.py`` (a whole cache), ``layers.py`` (what is in it of each
layer), ``calibration.py`` (statistics and parameters of ``int8-static``), all on ``checked.py``."""
