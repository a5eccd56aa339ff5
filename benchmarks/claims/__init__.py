"""The paper's claims, tested small: `python -m benchmarks.claims.run`. What came out stands in README.md."""
