"""What the farstep client and server agree on: protos, layouts, values, frames, addresses, errors."""

__version__ = "0.1.0"
