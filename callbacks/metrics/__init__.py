"""Metrics, one file for each family; each metric is a named protocol."""
