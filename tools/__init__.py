"""What the project measures and shows with; not installed."""
