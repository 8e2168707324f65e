"""jaxserve beside other libraries that run the same model, in one run."""
