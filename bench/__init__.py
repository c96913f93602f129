"""Benchmarks: what this machine takes, beside what plain PostgreSQL and the bare client library take in the same run."""
