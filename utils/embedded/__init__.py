"""How the embedded base and the sample data are made."""
