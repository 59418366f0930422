"""What the farstep client and server agree on: protos, layouts, values, frames, addresses, errors."""
