"""Deployment files and `constraints.txt`, the versions tested together."""
