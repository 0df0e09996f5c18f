"""Dask: the graph of a call, what runs in its tasks, and how arrays are brought into one cut."""
