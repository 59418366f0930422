"""farstep: ``torch.optim`` as a service."""
