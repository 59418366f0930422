"""The farstep server: hosts optimizers and steps them for remote workers."""
