"""Append and attention on CPUs: C++ kernels, compiled at first use, and what calls them."""
