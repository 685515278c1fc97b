"""nginx and HAProxy between the pool and its authorizers, for the tests only."""
