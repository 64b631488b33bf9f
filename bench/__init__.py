"""Benchmarks of a checkout: layers, whole networks, and what a GPU machine runs.

Packages import in this order: ``layers``, ``networks`` and ``gpu`` use ``rivals``, and all use the
modules beside them. ``tests/bench/test_structure.py`` checks it.
"""
