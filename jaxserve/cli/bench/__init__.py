"""`jaxserve bench`: a module a command."""
