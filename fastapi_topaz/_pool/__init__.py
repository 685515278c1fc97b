"""A pool of connections of any kind: no gRPC, no Topaz, no FastAPI."""
