"""A pool of gRPC connections to the Topaz authorizer for FastAPI."""
