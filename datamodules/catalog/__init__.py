"""Known datasets: their sources, installation and file readers."""
