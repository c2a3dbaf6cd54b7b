"""What a configuration costs: operations, memory and traffic, counted."""
