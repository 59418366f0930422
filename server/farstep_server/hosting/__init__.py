"""Hosting: owners that run hosted optimizers, the directory of them, and their snapshots."""
