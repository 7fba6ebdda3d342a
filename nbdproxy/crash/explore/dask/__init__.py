"""Exploring on a Dask cluster."""
