"""Programs with one mistake each, what we say of it, and what plain Pyro does."""
