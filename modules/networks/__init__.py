"""Networks and initializations that several methods use."""
