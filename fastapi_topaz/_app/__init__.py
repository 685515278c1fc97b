"""What a FastAPI application uses: the configuration and the guards of routes."""
