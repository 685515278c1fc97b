"""gRPC connections through grpc.aio, on asyncio and on trio."""
