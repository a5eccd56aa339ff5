"""The package, broken on purpose: `make torture`. What was found and mended stands in docs/reliability.md."""
