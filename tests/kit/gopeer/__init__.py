"""An authorizer on grpc-go, for the tests only: its source in Go, and its process."""
