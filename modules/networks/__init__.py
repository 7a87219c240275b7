"""Networks and weight initialization shared by several methods."""
