"""Run records and the tables rendered from them."""
