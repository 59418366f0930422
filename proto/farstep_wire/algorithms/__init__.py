"""Optimizers that ``torch.optim`` lacks. Client and server share the class, so it lives in the wire package."""

from farstep_wire.algorithms.conjugate_gradient import ConjugateGradient

__all__ = ["ConjugateGradient"]
