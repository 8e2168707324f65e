"""The HTTP server: OpenAI's protocol, metrics and a page, on the `Serving` seam."""
