"""The API of the Topaz authorizer: its options, messages and calls."""
