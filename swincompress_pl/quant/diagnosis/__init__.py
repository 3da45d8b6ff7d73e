"""Which layer and which value costs accuracy."""
