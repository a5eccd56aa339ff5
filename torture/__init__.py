"""The package, broken on purpose: `make torture`. Seeded, bounded in time, resumable; figures in docs/reliability.md."""
