"""Which codec stores what: the table of policies, policies by layer and their file, and what they cost.

``table.py`` (names, parsing), ``file.py`` (a policy for each layer as JSON), ``cost.py`` (bytes per token),
``fingerprint.py`` (what tells two models apart).
"""
