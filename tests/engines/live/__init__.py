"""Real engines with small random models on a CPU, behind the real Envoy and the service."""
