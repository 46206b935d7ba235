"""The places that a run has on a disk, its directory and its temporary folder: whose they are, and what a full one does."""
