"""An authorizer on grpc-go, for the tests only: its Go source, and its process."""
