"""What tests need: an embedded authorizer and fakes."""
