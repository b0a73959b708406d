"""Pages drawn on the controller from data a host gathered. Third-party libraries are allowed here, and nowhere else."""
