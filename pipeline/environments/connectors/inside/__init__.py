"""What runs in other processes, in whatever Python has the package that is meant: plain scripts of the standard
library."""
