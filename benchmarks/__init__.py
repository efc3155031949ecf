"""Programs that measure the figures on the pages again, `python -m benchmarks.NAME`."""
