"""The places that a run has on a disk, its directory and its temporary folder: whose they are, what a full one does."""
