"""Transports: how messages and their bytes get to a server and back."""
