"""The session: what stands between the proxy optimizer and a transport. No grpc here."""
