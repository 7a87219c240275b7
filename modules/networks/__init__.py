"""Networks and weight initialisation shared by several methods."""
