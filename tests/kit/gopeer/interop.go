package main

import (
	"google.golang.org/grpc"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
)

// serveInterop adds the service of gRPC's interoperability tests.
func serveInterop(server *grpc.Server) {
	testgrpc.RegisterTestServiceServer(server, interop.NewTestServer())
}
