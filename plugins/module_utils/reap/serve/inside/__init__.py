"""What runs inside the model's container."""
