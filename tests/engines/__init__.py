"""What the real engines make of a request: token vectors, and the engines themselves on a CPU."""
