"""Benchmarks: gate, then time. ``python -m bench.report`` runs all of them; see its docstring."""
