"""The known datasets: where each comes from, how to get it, how its files are read."""
