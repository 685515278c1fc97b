"""What transports of gRPC share: a target, metadata, what a connection offers."""
