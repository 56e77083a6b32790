"""What a cache says of itself: ``calls.py`` counts what ran, ``inventory.py`` measures what is held, ``report.py`` is
both at one moment."""
