"""The results page: `python -m benchmarks.results` trains, evaluates and writes docs/results.md with its figures."""
