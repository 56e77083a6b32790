"""What needs transformers 5.23 or newer is not collected with an older one."""

from kvquant_hf.batching.hooks import OLDEST, unsupported

collect_ignore_glob = ["test_[!v]*.py"] if f"needs transformers {OLDEST}" in unsupported() else []
