"""The servers of a teacher."""
