"""Code common to all gRPC transports: target, metadata, interface of connections."""
