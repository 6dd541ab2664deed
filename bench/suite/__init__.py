"""The benchmark suite: ``python -m bench.suite`` writes ``bench/reports/suite.*`` and plots."""
