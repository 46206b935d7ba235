"""The kinds of verifiers, a file each: `load(settings)` makes one of the plain values of its configuration."""
