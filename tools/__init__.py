"""Command-line tools: shards, convert, reconstruct, conformance, bench."""
