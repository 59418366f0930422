"""The gRPC side of the server: servicers decode, post or ask, and encode."""
