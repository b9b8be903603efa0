"""What is timed. ``python -m tests.benchmarks`` measures this machine and writes one page of Markdown."""
