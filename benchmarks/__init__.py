"""Times of the library's training step beside those of others; ``python -m benchmarks --help``."""
