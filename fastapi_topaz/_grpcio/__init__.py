"""gRPC connections through the public API of grpc.aio, on asyncio."""
