"""HTTP/2 for gRPC calls: a client without I/O, and its I/O on asyncio and trio."""
