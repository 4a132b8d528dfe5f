"""Clusters and machines: rates and links, built in or read from a file."""
