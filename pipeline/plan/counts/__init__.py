"""What a model has and does, counted: parameters, adapters, floating-point operations."""
