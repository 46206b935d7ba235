"""A table of faults, tried on the real tiny quickstart: `make chaos`."""
