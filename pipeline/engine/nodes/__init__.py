"""Servers on other nodes of a Ray cluster than the controller's, one node each or several together."""
